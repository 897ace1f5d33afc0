"""One rank's part of the trainer's model, as the benches beside this file use it: weights loaded, no optimizer, no engine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from slime.config import Config
    from slime.device import Device
    from slime.parallel import Ranks
    from slime.types import WeightBucket

BUCKET_BYTES = 2 << 30


def loaded_model(config: Config, checkpoint: str, ranks: Ranks, device: Device) -> list[torch.nn.Module]:
    """A rank's part of the model with the checkpoint's weights, on the device, in the dtype of a run."""
    from slime.model.build import build_model, padded_vocab_size
    from slime.model.hf_config import read_hf_config

    hf = read_hf_config(checkpoint)
    chunks = build_model(config, hf, ranks, device, dtype=device.default_params_dtype)
    load_weights(chunks, checkpoint, ranks, padded_vocab_size(config, hf))
    for chunk in chunks:
        chunk.to(device.torch_device)
    return chunks


def load_weights(chunks: list[torch.nn.Module], checkpoint: str, ranks: Ranks, padded_vocab: int) -> None:
    from slime.model.hf_config import read_hf_config
    from slime.model.hf_io import SafetensorsReader, load_hf
    from slime.model.names import NameTable

    names = NameTable.for_model(read_hf_config(checkpoint))
    load_hf(chunks, names, SafetensorsReader(checkpoint), ranks, padded_vocab=padded_vocab)


class OneRank:
    """The model as the trainer computes it, alone on the first device unless a rank of several is said."""

    def __init__(self, config: Config, bf16: str, fp8: str, *, rank: int = 0, world: int = 1) -> None:
        from slime.device import get_device
        from slime.model.build import own_vocabulary, padded_vocab_size
        from slime.model.hf_config import read_hf_config
        from slime.parallel import init_ranks
        from slime.training.forward import Pipeline

        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29531")
        self.device = get_device()
        self.device.init_process(rank)
        self.ranks = init_ranks(config.parallel, rank=rank, world_size=world, device=self.device, seed=1)
        self.hf = read_hf_config(bf16)
        self.served = {False: self.hf, True: read_hf_config(fp8)}
        self.checkpoint = bf16
        self.padded_vocab_size = padded_vocab_size(config, self.hf)
        self.chunks = loaded_model(config, bf16, self.ranks, self.device)
        for chunk in self.chunks:
            chunk.config.variable_seq_lengths = True
        self.vocab_size = self.hf["vocab_size"]
        self.vocabulary = own_vocabulary(self.padded_vocab_size, self.hf, self.ranks)
        self.pipeline = Pipeline(self.chunks, self.ranks, self.device)

    def load(self) -> None:
        """The checkpoint's weights again, after `change`."""
        load_weights(self.chunks, self.checkpoint, self.ranks, self.padded_vocab_size)

    def log_probs(self, tokens: Sequence[int], num_response: int) -> list[float]:
        """Of the last `num_response` tokens, at temperature 1."""
        import numpy as np

        from slime.batch.pack import pack
        from slime.training.forward import response_log_probs
        from slime.types import RolloutBatch

        one = np.zeros(1, np.int64)
        batch = RolloutBatch(
            rollout_id=0, tokens=(np.asarray(tokens, np.int64),), response_lengths=one + num_response,
            loss_masks=(np.ones(num_response, np.float32),), rewards=one.astype(np.float32), raw_rewards=one.astype(np.float32),
            groups=one, trajectories=one, sample_ids=one, truncated=one.astype(bool),
        )  # fmt: skip
        micro = pack(batch, [0], loss_weight=np.ones(1), multiple=128)

        def read(micro, output):
            values, _ = response_log_probs(
                micro, output, self.ranks, vocabulary=self.vocabulary, temperature=1.0, chunk_size=16384
            )
            return values.cpu().tolist()

        return self.pipeline.evaluate([micro], read)[0]

    def selections(self, tokens: Sequence[int], *, scoring: str) -> dict[int, Tensor]:
        """0-based computing layer -> int32 [len(tokens), topk]: the keys that each position reads, -1 for none.

        scoring: "params" or "fp8", as --dsa-index-scoring.
        """
        with self._recorded(scoring) as picked:
            self.log_probs(tokens, 1)
        return {layer - 1: rows[: len(tokens)] for layer, rows in picked.items()}

    @contextmanager
    def _recorded(self, scoring: str) -> Iterator[dict[int, Tensor]]:
        from slime_plugins.models.glm5.attention import SparseLatentAttention

        picked: dict[int, Tensor] = {}
        inside = (module for chunk in self.chunks for module in chunk.modules())
        modules = [module for module in inside if isinstance(module, SparseLatentAttention) and module.runs_indexer]
        before = [module.index_scoring for module in modules]

        def recorded(module):
            own = module.run_indexer

            def run_indexer(*args: object, **kwargs: object) -> Tensor:
                picked[module.layer_number] = own(*args, **kwargs)
                return picked[module.layer_number]

            return run_indexer

        for module in modules:
            module.index_scoring, module.run_indexer = scoring, recorded(module)
        try:
            yield picked
        finally:
            for module, scored in zip(modules, before, strict=True):
                module.index_scoring = scored
                del module.run_indexer

    def change(self) -> None:
        """Other weights, far enough away that an engine which did not take them is seen."""
        import torch

        generator = torch.Generator(self.device.torch_device).manual_seed(5)
        with torch.no_grad():
            for chunk in self.chunks:
                for parameter in chunk.parameters():
                    noise = torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=parameter.dtype)
                    parameter.add_(noise * parameter.std() if parameter.ndim > 1 else 0.1 * noise, alpha=0.3)
                    parameter.copy_(parameter.bfloat16())  # what the wire carries

    def buckets(self, *, fp8: bool) -> Iterator[WeightBucket]:
        from slime.model.export import export_weights
        from slime.model.names import NameTable
        from slime.weights.buckets import fill_buckets
        from slime.weights.quantize import WireFormat

        wire = WireFormat.of_checkpoint(self.served[fp8])
        groups = export_weights(self.chunks, NameTable.for_model(self.served[fp8]), self.ranks, gather_to_source=False)
        return fill_buckets((wire.encode_group(group) for group in groups if group), limit_bytes=BUCKET_BYTES)
