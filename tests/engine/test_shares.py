"""Each rank gets the shares that SGLang's own loader copies, and garbage in place of the rest: of every matrix in an engine of
plain tensor parallelism, of the output layer beside data-parallel attention. SGLang's GLM-5.2 and its draft model in block FP8;
the same of a server is in `test_intake.py`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from engine.holes import with_holes
from engine.stock_glm import FRESH, load_on_ranks
from engine.test_stock_glm import own

from slime.model.hf_config import read_hf_config
from slime.model.hf_io import SafetensorsReader
from slime.weights.serving import Receiver
from tools.make_tiny_checkpoint import GlmSize, Preset, write_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="sglang is not installed"),
]

RANKS, KINDS = 2, ("target", "draft")
# Half of every matrix is whole FP8 blocks of 128.
SIZE = GlmSize(
    num_hidden_layers=3, n_routed_experts=4, first_k_dense_replace=1, hidden_size=128, intermediate_size=256,
    moe_intermediate_size=256, num_attention_heads=8, qk_nope_head_dim=96, qk_rope_head_dim=32, v_head_dim=32, q_lora_rank=128,
)  # fmt: skip
Held = dict[str, torch.Tensor]


ENGINES = {
    "plain": Receiver(0, (0, 1), RANKS, drafts=True, cuts=True),
    "head": Receiver(0, (0, 1), RANKS, ep=RANKS, drafts=True, cuts_head=True),
}
CUT = {
    "plain": ("q_b_proj", "kv_b_proj", "o_proj", "w13_weight", "w2_weight", "w13_weight_scale_inv", "lm_head"),
    "head": ("lm_head",),
}
"""What the two ranks hold different rows or columns of; experts apart are not in it."""


@pytest.fixture(scope="module", params=list(ENGINES))
def loaded(request, tmp_path_factory) -> tuple[str, dict[tuple[str, str, int], Held], list[int]]:
    """(layout, (model, "whole" or "share", rank) -> its parameters, by rank how many weights were sent)."""
    folder, layout = tmp_path_factory.mktemp("shares"), request.param
    write_checkpoint(folder / "fp8", Preset("glm", SIZE, 1 << 20), seed=0, fp8=True)
    reader, hf = SafetensorsReader(folder / "fp8"), read_hf_config(folder / "fp8")
    named = [(name, reader.raw(name)) for name in reader.names()]
    words, sent = [], []
    for rank in range(RANKS):
        mine = own(named, rank) if ENGINES[layout].ep > 1 else named
        share, weights = with_holes(mine, hf, ENGINES[layout], rank)
        sent.append(weights)
        for what, update in (("whole", mine), ("share", share)):
            torch.save([update], folder / f"{what}-{rank}.pt")
        jobs = [(kind, what) for kind in KINDS for what in ("whole", "share")]
        paths = [
            (str(folder / "fp8"), kind, "1", _file(folder, what, rank), _file(folder, what, rank, kind)) for kind, what in jobs
        ]
        words.append([word for job in paths for word in job])
    load_on_ranks(folder, layout, words)
    found = {
        (kind, what, rank): torch.load(_file(folder, what, rank, kind))
        for kind in KINDS
        for what in ("whole", "share")
        for rank in range(RANKS)
    }
    return layout, found, sent


def _file(folder: Path, *words: object) -> str:
    return str(folder / f"{'-'.join(map(str, words))}.pt")


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_is_given_its_shares_alone_holds_the_same_weights_to_the_bit(loaded, kind, rank):
    layout, held, _ = loaded
    whole, share = held[kind, "whole", rank], held[kind, "share", rank]
    assert whole.keys() == share.keys() and len(whole) > 20
    for name, parameter in whole.items():
        found, wanted = (tensor.reshape(-1).view(torch.uint8) for tensor in (share[name], parameter))
        assert torch.equal(found, wanted), name
    other = held[kind, "whole", 1 - rank]
    cut = {name for name in whole if not torch.equal(*(of[name].reshape(-1).view(torch.uint8) for of in (whole, other)))}
    for matrix in CUT[layout] if kind == "target" else CUT[layout][:-1]:  # the draft's output layer is the target's
        assert any(matrix in name for name in cut), f"both ranks hold the same {matrix}"


def test_what_a_rank_is_sent_is_what_it_serves(loaded):
    """Number by number, of both models together, or of the output layer. What no update reaches is left out: scales of the KV
    cache, and the draft's embedding and output layer, which are the target's."""
    layout, held, sent = loaded
    for rank in range(RANKS):
        parameters = [pair for kind in KINDS for pair in held[kind, "whole", rank].items() if not _is_fresh(pair[1])]
        served = {name: parameter.numel() for name, parameter in parameters if "scale" not in name}
        if layout == "plain":
            assert sent[rank].total() == sum(parameter.numel() for name, parameter in parameters if "scale" not in name)
        assert sent[rank]["lm_head.weight"] == served["lm_head.weight"]


def _is_fresh(parameter: torch.Tensor) -> bool:
    return bool((parameter.reshape(-1).view(torch.uint8) == FRESH).all())
