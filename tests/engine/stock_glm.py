"""Loads weight updates into SGLang's own GLM-5.2, or its draft model, on the CPU. Run as a program, in an engine's environment.

    python tests/engine/stock_glm.py RANK RANKS STORE LAYOUT [FOLDER KIND FUSED UPDATE OUT] ...

RANK of RANKS of an engine. STORE: file where they meet. LAYOUT: `recipe` (attention and head data-parallel, experts apart),
`head` (the same with the output layer cut over the ranks) or `plain` (every matrix is). FOLDER: the serving checkpoint (its
config.json is read). KIND: target or draft. FUSED: 1 builds the indexer as on CUDA, its key and gate projections one matrix.
UPDATE: torch file, a list of calls, each a list of (name, tensor). OUT: torch file, what every parameter holds after them;
FRESH is where nothing was written. The models of one folder, kind and form are one.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from slime.compat.sglang import host_environment

FRESH = 0x7F
"""Every byte of a parameter before the first call: NaN in e4m3, and no value that a test would send."""


@lru_cache(maxsize=1)
def build(folder: str, kind: str, *, fused: bool) -> torch.nn.Module:
    from sglang.srt.layers.attention.dsa import dsa_indexer
    from sglang.srt.layers.quantization.fp8 import Fp8Config
    from sglang.srt.models import deepseek_v2, glm4_moe
    from sglang.srt.utils.hf_transformers_utils import get_config

    # Rotary tables hold no weights, and SGLang's factory has no CPU kind without scaling.
    dsa_indexer.get_rope_wrapper = deepseek_v2.get_rope_wrapper = lambda *_, **__: torch.nn.Identity()
    model_class = glm4_moe.GlmMoeDsaForCausalLM if kind == "target" else glm4_moe.GlmMoeDsaForCausalLMNextN
    config = get_config(folder, trust_remote_code=False)
    config.architectures = [model_class.__name__]  # as ModelConfig does for a draft model
    quantization = getattr(config, "quantization_config", None)
    if fused:
        dsa_indexer._is_cuda, dsa_indexer.resolve_num_sms = True, lambda *_: 132
    torch.set_default_dtype(torch.bfloat16)
    try:
        return model_class(config, Fp8Config.from_config(quantization) if quantization else None)
    finally:
        torch.set_default_dtype(torch.float32)
        dsa_indexer._is_cuda = False


def load(folder: str, kind: str, fused: str, update: str, out: str) -> None:
    model = build(folder, kind, fused=fused == "1")
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.data.view(-1).view(torch.uint8).fill_(FRESH)
    for call in torch.load(update):
        model.load_weights(call)
    torch.save({name: parameter.detach().clone() for name, parameter in parameters.items()}, out)


def load_on_ranks(folder: Path, layout: str, words: Sequence[Sequence[str]]) -> None:
    """One process for each rank, with its own words; their logs and where they meet are in the folder."""
    running = []
    try:
        for rank, own in enumerate(words):
            told = [str(rank), str(len(words)), str(folder / f"store-{layout}"), layout, *own]
            with open(folder / f"log-{layout}-{rank}", "w") as log:
                command, env = [sys.executable, __file__, *told], host_environment(cores=[rank])
                running.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
        codes = [process.wait(timeout=600) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0] * len(words), (folder / f"log-{layout}-0").read_text()[-3000:]


def main(rank: str, ranks: str, store: str, layout: str, *words: str) -> None:
    from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from sglang.srt.runtime_context import SpawnRanks, get_context, publish

    size = int(ranks)
    sizes = dict(tp_size=size)
    if layout in ("recipe", "head") and size > 1:
        sizes |= dict(ep_size=size, attn_dp_size=size, moe_dense_tp_size=1, enable_dp_lm_head=layout == "recipe")
    with get_context().override_server_args(device="cpu", dtype="bfloat16", **sizes) as args:
        publish(args, role="scheduler", ranks=SpawnRanks(world_rank=int(rank)))
        place = dict(world_size=size, rank=int(rank), local_rank=int(rank))
        init_distributed_environment(**place, backend="gloo", distributed_init_method=f"file://{store}")
        initialize_model_parallel(backend="gloo")
        for first in range(0, len(words), 5):
            load(*words[first : first + 5])


if __name__ == "__main__":
    main(*sys.argv[1:])
