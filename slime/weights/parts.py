"""One trainer rank's tensors as the parts that a plan speaks of, written in the engines' format where they travel from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from slime.config.stages import Chunk
from slime.model.layout import unmerge, unshard
from slime.model.local import local_tensors, split_of, unwrap
from slime.model.names import Entry, NameTable
from slime.model.placement import Grid
from slime.ops.fp8 import quantize_blockwise, quantize_many
from slime.parallel import Ranks
from slime.weights.lanes import Trainer
from slime.weights.tables import Room, Write

COPIED_BYTES = 1 << 28
"""Of tensors that were put together or taken apart and wait to be quantised, beside a round's buffers."""


class TrainedParts:
    """Made anew for each sync: after the trainer slept its tensors lie elsewhere."""

    def __init__(self, chunks: list[torch.nn.Module], table: NameTable, ranks: Ranks, *, block: int):
        self._ranks, self._block = ranks, block
        self._tensors: dict[str, Tensor] = {}
        for local in local_tensors(chunks, ranks):
            # A later stage's copy of the embedding has another name, or the name of the tied head.
            self._tensors.setdefault(table.aliases.get(local.name, local.name), local.tensor)
        self._to_quantize: list[tuple[Tensor, Tensor, Tensor]] = []
        self._copied: dict[int, int] = {}
        """Of storages that are not the model's: address -> bytes."""

    def is_in_group(self, entry: Entry, holder: int) -> bool:
        """Whether this rank is in the tensor-parallel group of a holder of the entry."""
        return holder in dist.get_process_group_ranks(self._group(entry))

    def write(self, writes: Iterable[Write], into: Tensor, *, gathered: bool) -> None:
        """A delivery's bytes, in one pass: number formats are changed on the way. They are there after `finish`.

        into: uint8 [bytes of the delivery]. gathered: the tensor-parallel group puts each tensor together first, all of its
        members in the same order (`take_part` for those that write nothing).
        """
        whole: tuple[Entry, list[Tensor]] | None = None
        rooms = _Rooms(into)
        for one in writes:
            if whole is None or whole[0] is not one.entry:
                whole = one.entry, self._hf_parts(one.entry, gathered)
            self._encode(whole[1][one.number][one.where], one, rooms)
            if self._copied and sum(self._copied.values()) > COPIED_BYTES:
                self.finish()

    def finish(self) -> None:
        """Quantises all that was written on a GPU since the last time, at once."""
        quantize_many(self._to_quantize, self._block)
        self._to_quantize, self._copied = [], {}

    def take_part(self, entries: Iterable[Entry]) -> None:
        """In the gathering of tensors that another rank of the group writes."""
        for entry in entries:
            self._gather(entry)

    def _hf_parts(self, entry: Entry, gathered: bool) -> list[Tensor]:
        """This rank's share of each HF tensor of the entry; padding rows of a vocabulary are at the end."""
        if gathered:
            return unmerge(entry, unshard(entry, self._gather(entry)))
        return unmerge(entry, self._tensors[entry.name], size=split_of(entry, self._ranks)[1] if entry.split != "none" else 1)

    def _gather(self, entry: Entry) -> list[Tensor]:
        own = self._tensors[entry.name].contiguous()
        shards = [torch.empty_like(own) for _ in range(split_of(entry, self._ranks)[1])]
        dist.all_gather(shards, own, group=self._group(entry))
        return shards

    def _group(self, entry: Entry) -> dist.ProcessGroup:
        return self._ranks.etp_group if entry.expert is not None else self._ranks.tp_group

    def _encode(self, part: Tensor, write: Write, rooms: _Rooms) -> None:
        room = rooms[write.weight]
        if write.scale is None:
            room.copy_(part)
            return
        scales = rooms[write.scale]
        if part.is_cuda:
            self._to_quantize.append((part, room, scales))
            storage, own = part.untyped_storage(), self._tensors[write.entry.name].untyped_storage()
            if storage.data_ptr() != own.data_ptr():
                self._copied[storage.data_ptr()] = storage.nbytes()
            return
        for target, found in zip((room, scales), quantize_blockwise(part, self._block), strict=True):
            target.copy_(found)


class _Rooms:
    """The tensors of a delivery in its bytes: one call for each, for there are many."""

    def __init__(self, into: Tensor):
        self._into, self._typed = into, {}

    def __getitem__(self, room: Room) -> Tensor:
        if room.dtype not in self._typed:
            self._typed[room.dtype] = self._into.view(getattr(torch, room.dtype))
        flat = self._typed[room.dtype]
        return flat.as_strided(room.shape, room.steps, flat.storage_offset() + room.first)


def trainer_of(chunks: Sequence[torch.nn.Module], ranks: Ranks, *, mtp: bool) -> Trainer:
    """Where the model lies, asked of all ranks; a collective of them. mtp: its multi-token-prediction layer is trained."""
    models = [unwrap(chunk) for chunk in chunks]
    layers = [[layer.layer_number - 1 for layer in model.decoder.layers] for model in models]
    own = [
        Chunk(ranks.pp_rank, number, range(held[0], held[-1] + 1) if held else range(0)) for number, held in enumerate(layers)
    ]
    vocab = max((_embedding_rows(model) for model in models), default=0) * ranks.tp_size
    everybody: list[tuple[list[Chunk], int]] = [(own, vocab)] * ranks.world_size
    dist.all_gather_object(everybody, (own, vocab))
    found = {(chunk.vp_stage, chunk.pp_rank): chunk for chunks_of_rank, _ in everybody for chunk in chunks_of_rank}
    grid = Grid(ranks.world_size, ranks.tp_size, ranks.pp_size, ranks.cp_size, ranks.ep_size, ranks.etp_size)
    return Trainer(grid, tuple(found[key] for key in sorted(found)), mtp=mtp, padded_vocab=max(rows for _, rows in everybody))


def _embedding_rows(model: torch.nn.Module) -> int:
    """Rows of this rank's part of the embedding; 0 where the stage has none."""
    embedding = getattr(model, "embedding", None)
    return embedding.word_embeddings.weight.shape[0] if embedding is not None else 0
