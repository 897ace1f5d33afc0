"""This rank's tensors under their global names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from slime.model.layout import shard_shape
from slime.model.names import Entry, NameTable
from slime.parallel import Ranks

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_STACKED = re.compile(r"^(.*\.mlp\.experts\.linear_fc[12]\.weight)$")
# Buffers that belong to the checkpoint; every other buffer is scratch.
_BUFFERS = ("expert_bias",)


VALUE_HEAD = "value_head.weight"
"""Global name of a critic's head (slime.model.value). No model of Hugging Face's has one, so it is in no table of names."""


@dataclass(frozen=True)
class LocalTensor:
    """name: global Megatron name. tensor: this rank's data (an expert's is a view into the stacked parameter).

    parameter: the nn.Parameter behind it, None for a buffer.
    """

    name: str
    tensor: Tensor
    parameter: torch.nn.Parameter | None

    @property
    def is_expert(self) -> bool:
        return ".mlp.experts." in self.name

    @property
    def is_copy(self) -> bool:
        """A later pipeline stage's copy of the embedding, which megatron-core marks and keeps in step with the first's."""
        return getattr(self.parameter, "shared", False)


def unwrap(chunk: torch.nn.Module) -> torch.nn.Module:
    """The GPTModel inside DDP and other wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _data(parameter: torch.nn.Parameter) -> Tensor:
    return parameter.data


def local_tensors(
    chunks: list[torch.nn.Module],
    ranks: Ranks,
    *,
    experts: bool = True,
    of: Callable[[torch.nn.Parameter], Tensor] = _data,
) -> Iterator[LocalTensor]:
    """Every parameter and checkpointed buffer of this rank, experts one by one (or as their stack under the unnumbered name).

    of: which tensor of a parameter is meant, e.g. its gradient.
    """
    for chunk in chunks:
        model = unwrap(chunk)
        offset = model.decoder.layers[0].layer_number - 1 if len(model.decoder.layers) else 0
        for name, parameter in model.named_parameters():
            yield from _expanded(_global_name(name, offset), parameter, ranks, experts, of)
        for name, buffer in model.named_buffers():
            if name.rsplit(".", 1)[-1] in _BUFFERS and buffer is not None:
                yield LocalTensor(_global_name(name, offset), buffer, None)


def _global_name(name: str, offset: int) -> str:
    return _LAYER.sub(lambda match: f"decoder.layers.{int(match.group(1)) + offset}.", name)


def _expanded(
    name: str, parameter: torch.nn.Parameter, ranks: Ranks, experts: bool, of: Callable[[torch.nn.Parameter], Tensor]
) -> Iterator[LocalTensor]:
    tensor = of(parameter)
    if not (experts and _STACKED.match(name)):
        yield LocalTensor(name, tensor, parameter)
        return
    first = ranks.ep_rank * parameter.shape[0]
    for number in range(parameter.shape[0]):
        yield LocalTensor(f"{name}{first + number}", tensor[number], parameter)


def split_of(entry: Entry, ranks: Ranks) -> tuple[int, int]:
    """(position, size) of this rank in the group that cuts the entry's tensor."""
    return (ranks.etp_rank, ranks.etp_size) if entry.expert is not None else (ranks.tp_rank, ranks.tp_size)


def check_shapes(chunks: list[torch.nn.Module], table: NameTable, ranks: Ranks, padded_vocab: int) -> None:
    """Raise ValueError listing every local tensor whose name or shape is not what the table expects on this rank."""
    wrong = []
    for local in local_tensors(chunks, ranks):
        if local.name == VALUE_HEAD:
            continue
        entry = table[local.name]
        expected = shard_shape(entry, split_of(entry, ranks)[1], padded_vocab=padded_vocab)
        if tuple(local.tensor.shape) != expected:
            wrong.append(f"{local.name}: model {list(local.tensor.shape)}, table {list(expected)}")
    if wrong:
        raise ValueError(f"{len(wrong)} tensors differ from the weight table:\n  " + "\n  ".join(wrong[:20]))
