"""What the benches of engines and layers reckon, where no GPU is needed: shared keys, FLOPs by parts, tables, an identity that
notes moments."""

import json

import torch
from by_hand import by_hand

from slime.model.hf_config import HfConfig, read_hf_config
from slime.model.names import NameTable
from slime.rehearse.model.flops import model_work
from tools.bench import engine_matrix, layer_parts
from tools.bench.model_args import model_args
from tools.make_tiny_checkpoint import PRESETS, glm_config
from tools.make_tiny_checkpoint import main as make_checkpoint
from tools.tiny_tokenizer import TokenizerFacts

MINI = HfConfig(glm_config(PRESETS["mini"].size, TokenizerFacts(320, (1,), 1)))


def test_shared_keys_are_counted_without_order_and_without_empty_places():
    mine = torch.tensor([[0, 1, 2, 3], [5, 4, -1, -1]])
    theirs = torch.tensor([[3, 2, 9, -1], [4, 5, -1, -1]])
    assert engine_matrix.overlap(mine, theirs) == [0.75, 0.5]
    # Told as slots of a cache whose first page is another's.
    assert engine_matrix.overlap(mine, theirs + 64) == [0.0, 0.0]


def test_a_row_for_one_rank_has_no_attention_of_several():
    args = engine_matrix._parse(["--bf16", "a", "--fp8", "b", "--ranks", "1", "--lengths", "1000,16000x2"])[0]
    assert args.lengths == {1000: 8, 16000: 2}
    for ranks, attention in ((1, False), (2, True)):
        row = engine_matrix.ROWS["recipe, deepep low latency"]
        spec = engine_matrix._engine(row, ranks, args, engine_matrix.Path("/tmp/none.log"), "host").spec
        assert ("enable_dp_attention" in spec.settings, spec.dp_size, spec.ep_size) == (attention, ranks, ranks)


def test_the_parts_of_a_layer_make_up_its_training():
    """Of the mini model's computing and shared MoE layers; the indexer's weights have no gradient, which the sum knows."""
    rows = 8192
    work = model_work(NameTable.for_model(MINI), MINI, rows)
    indexer = 2048 * 32 * 128 + 6144 * 128 + 6144 * 32
    for layer in (6, 7):
        parts = layer_parts.model_flops(MINI, layer, rows)
        frozen = 4 * indexer if MINI.runs_indexer(layer) else 0
        assert sum(parts.values()) == rows * (work.layers[layer].training(recompute=False) - frozen)


def test_moments_of_a_part_stand_around_its_backward():
    clock = layer_parts.Clock(cuda=False)
    parts = layer_parts.Parts(clock)
    order = []

    class Layer:
        def half(self, x):
            x.register_hook(lambda _: order.append("inside"))
            return x / 2

    layer = Layer()
    parts.mark("half", layer, "half")
    clock.now = lambda: order.append("noted") or 0.0
    start = torch.ones(3, requires_grad=True)
    (layer.half(start * 1) * 3).sum().backward()
    assert order == ["noted", "noted", "noted", "inside", "noted"]  # forward's two, then backward's around its middle
    assert start.grad.tolist() == [1.5] * 3 and parts.times() == {"half": (0.0, 0.0)}


@by_hand("10 s")
def test_a_layer_over_two_ranks_is_timed_with_half_of_its_work_on_each(tmp_path, monkeypatch):
    monkeypatch.setenv("GLM52_TINY", "cpu")
    make_checkpoint(["--preset", "cpu", "--output", str(tmp_path)])
    layout = "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 --expert-tensor-parallel-size 1"
    bench = ["--bf16", f"{tmp_path}/bf16", "--rows", "64", "--ranks", "2", "--layers", "7", "--repeats", "1"]
    layer_parts.main([*bench, "--json", f"{tmp_path}/told", "--", *model_args("glm5.2-tiny"), *layout.split()])
    parts = json.loads((tmp_path / "told").read_text())["layers"]["7"]
    whole = layer_parts.model_flops(read_hf_config(f"{tmp_path}/bf16"), 7, 128)
    assert {part["part"]: part["model_flops"] for part in parts if part["part"] in whole} == {
        part: work / 2 for part, work in whole.items() if part != "indexer"
    }
    assert all(part["forward_ms"] > 0 for part in parts if part["part"] in whole)
