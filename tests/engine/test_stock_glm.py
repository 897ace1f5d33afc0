"""SGLang's own loader of GLM-5.2 in block FP8, on two ranks of an engine of the recipe's kind: what each must be given, and in
which company. Target and draft model; no server, since on a CPU SGLang cannot run this model."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch
from engine.stock_glm import FRESH, load_on_ranks

from slime.model.hf_io import SafetensorsReader
from tools.make_tiny_checkpoint import GlmSize, Preset, write_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="sglang is not installed"),
]

LAYERS, EXPERTS, RANKS = 4, 4, 2
# SGLang wants whole FP8 blocks of 128 in what it cuts (the shared expert) and where it joins matrices.
SIZE = GlmSize(
    num_hidden_layers=LAYERS, intermediate_size=256, moe_intermediate_size=256, q_lora_rank=128, n_routed_experts=EXPERTS
)
EXPERT = re.compile(r"\.experts\.(\d+)\.")

Named = list[tuple[str, torch.Tensor]]


def own(named: Named, rank: int) -> Named:
    """What a rank serves: its contiguous block of the experts, and all that is no expert."""
    mine = range(rank * EXPERTS // RANKS, (rank + 1) * EXPERTS // RANKS)
    return [(name, tensor) for name, tensor in named if (at := EXPERT.search(name)) is None or int(at[1]) in mine]


def in_two_calls(named: Named, last: str) -> list[Named]:
    """Names with this ending come in a call of their own."""
    late = [pair for pair in named if pair[0].endswith(last)]
    return [[pair for pair in named if not pair[0].endswith(last)], late]


UPDATES = {
    "everything": lambda named, rank: [named],
    "its own": lambda named, rank: [own(named, rank)],
    "its own, backwards, a name at a time but for what SGLang joins": lambda named, rank: joined_calls(own(named, rank)[::-1]),
    "scales of experts later": lambda named, rank: in_two_calls(own(named, rank), "down_proj.weight_scale_inv"),
    "half of a pair later": lambda named, rank: in_two_calls(own(named, rank), "kv_a_proj_with_mqa.weight"),
    "scale of the index key later": lambda named, rank: in_two_calls(own(named, rank), "indexer.wk.weight_scale_inv"),
}
KINDS = ("target", "draft")


def joined_calls(named: Named) -> list[Named]:
    """Names that SGLang makes one matrix of are in one call, every other name is alone."""
    calls: dict[str, Named] = {}
    for name, tensor in named:
        key = re.sub(r"\.(q_a_proj|kv_a_proj_with_mqa)\.", ".a_proj.", name)
        calls.setdefault(re.sub(r"\.indexer\.wk\.weight\w*$", ".indexer.wk", key), []).append((name, tensor))
    return list(calls.values())


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int], dict[str, torch.Tensor]]:
    """(model, update, rank) -> its parameters, as bytes."""
    folder = tmp_path_factory.mktemp("glm")
    write_checkpoint(folder / "fp8", Preset("glm", SIZE, 1 << 20), seed=0, fp8=True)
    reader = SafetensorsReader(folder / "fp8")
    named = [(name, reader.raw(name)) for name in reader.names()]
    for rank in range(RANKS):
        for number, update in enumerate(UPDATES.values()):
            torch.save(update(named, rank), folder / f"{number}-{rank}.pt")
    words = [
        [
            word
            for kind in KINDS
            for n in range(len(UPDATES))
            for word in (str(folder / "fp8"), kind, "1", str(folder / f"{n}-{rank}.pt"), str(folder / f"{kind}-{n}-{rank}.pt"))
        ]
        for rank in range(RANKS)
    ]
    load_on_ranks(folder, "recipe", words)
    return {
        (kind, update, rank): {
            name: tensor.reshape(-1).view(torch.uint8) for name, tensor in torch.load(folder / f"{kind}-{n}-{rank}.pt").items()
        }
        for kind in KINDS
        for n, update in enumerate(UPDATES)
        for rank in range(RANKS)
    }


def differing(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> set[str]:
    assert left.keys() == right.keys()
    return {name for name in left if not torch.equal(left[name], right[name])}


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("update", [name for name in UPDATES if name.startswith(("its own", "scales of experts"))])
def test_a_rank_that_is_given_its_own_experts_alone_holds_the_same_weights_to_the_bit(held, kind, update, rank):
    everything = held[kind, "everything", rank]
    experts = {name: tensor for name, tensor in everything.items() if ".experts." in name}
    assert len(experts) == 4 and not any((tensor == FRESH).all() for tensor in experts.values())
    assert differing(held[kind, update, rank], everything) == set()
    assert differing(everything, held[kind, "everything", 1 - rank]) >= set(experts), "both ranks hold the same experts"


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_that_sglang_joins_stays_as_it_was_when_its_halves_come_in_two_calls(held, kind, rank):
    """And nothing says so. It is why the weight table knows of pairs (`Entry.together`)."""
    everything, layers = held[kind, "everything", rank], range(LAYERS) if kind == "target" else [LAYERS]
    prefix = {layer: "model.decoder" if kind == "draft" else f"model.layers.{layer}" for layer in layers}
    update = held[kind, "half of a pair later", rank]
    joined = {f"{prefix[layer]}.self_attn.fused_qkv_a_proj_with_mqa.weight" for layer in layers}
    assert differing(update, everything) == joined
    assert all((update[name] == FRESH).all() for name in joined)


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("kind", KINDS)
def test_the_index_key_stays_as_it_was_when_its_scale_comes_in_another_call(held, kind, rank):
    everything, computing = held[kind, "everything", rank], range(3) if kind == "target" else [LAYERS]
    prefix = {layer: "model.decoder" if kind == "draft" else f"model.layers.{layer}" for layer in computing}
    joined = {f"{prefix[layer]}.self_attn.indexer.wk_weights_proj.weight" for layer in computing}
    assert differing(held[kind, "scale of the index key later", rank], everything) == joined
