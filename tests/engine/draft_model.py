"""Loads weight updates into SGLang's own draft model of GLM-5.2 on the CPU. Run as a program, in an engine's environment.

    python tests/engine/draft_model.py [FOLDER FUSED BUCKETS OUT] ...

FOLDER: the serving checkpoint (its config.json is read). FUSED: 1 builds the indexer as on CUDA, its key and gate projections
one matrix. BUCKETS: torch file, a list of updates, each a list of (name, tensor). OUT: torch file, what every parameter holds
after them; FRESH is where nothing was written.
"""

from __future__ import annotations

import sys
import tempfile

import torch

FRESH = 0x7F
"""Every byte of a parameter before the first update: NaN in e4m3, and no value that a test would send."""


def build(folder: str, *, fused: bool) -> torch.nn.Module:
    from sglang.srt.layers.attention.dsa import dsa_indexer
    from sglang.srt.layers.quantization.fp8 import Fp8Config
    from sglang.srt.models import deepseek_v2
    from sglang.srt.models.glm4_moe import GlmMoeDsaForCausalLMNextN
    from sglang.srt.utils.hf_transformers_utils import get_config

    # Rotary tables hold no weights, and SGLang's factory has no CPU kind without scaling.
    dsa_indexer.get_rope_wrapper = deepseek_v2.get_rope_wrapper = lambda *_, **__: torch.nn.Identity()
    config = get_config(folder, trust_remote_code=False)
    config.architectures = [GlmMoeDsaForCausalLMNextN.__name__]  # as ModelConfig does for a draft model
    quantization = getattr(config, "quantization_config", None)
    if fused:
        dsa_indexer._is_cuda, dsa_indexer.resolve_num_sms = True, lambda *_: 132
    torch.set_default_dtype(torch.bfloat16)
    try:
        return GlmMoeDsaForCausalLMNextN(config, Fp8Config.from_config(quantization) if quantization else None)
    finally:
        torch.set_default_dtype(torch.float32)
        dsa_indexer._is_cuda = False


def load(folder: str, fused: str, buckets: str, out: str) -> None:
    model = build(folder, fused=fused == "1")
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.data.view(-1).view(torch.uint8).fill_(FRESH)
    for bucket in torch.load(buckets):
        model.load_weights(bucket)
    torch.save({name: parameter.detach().clone() for name, parameter in parameters.items()}, out)


def main(*words: str) -> None:
    from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from sglang.srt.runtime_context import SpawnRanks, get_context, publish

    with get_context().override_server_args(device="cpu", dtype="bfloat16") as args, tempfile.TemporaryDirectory() as scratch:
        publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0))
        place = dict(world_size=1, rank=0, local_rank=0)
        init_distributed_environment(**place, backend="gloo", distributed_init_method=f"file://{scratch}/store")
        initialize_model_parallel(backend="gloo")
        for first in range(0, len(words), 4):
            load(*words[first : first + 4])


if __name__ == "__main__":
    main(*sys.argv[1:])
