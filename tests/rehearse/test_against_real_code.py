"""The arithmetic of the rehearsal against the code that it speaks for: megatron-core's cuts, the weight stream, built ranks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slime.config.stages import Cut, cut_layers
from slime.model.hf_config import HfConfig, read_hf_config
from slime.model.layout import shard_shape
from slime.model.names import NameTable
from slime.model.placement import Grid
from slime.ops import vocab_logprob
from slime.rehearse.known_models import known_config
from slime.rehearse.model import memory
from slime.rehearse.model.shares import local_numel
from slime.rehearse.model.weight_map import build_weight_map
from slime.weights.digest import plan_digest
from slime.weights.plan import Receiver, Trainer, nodes_of, plan_sync
from slime.weights.quantize import WireFormat
from slime.weights.wire import Format
from slime_plugins.models.glm5.ops import hopper_ops
from tests.rehearse.recipes import Recipe, one_node

CUTS = [
    Cut(78, 8, first=14, last=16),
    Cut(78, 8, first=2, last=4),
    Cut(78, 2),
    Cut(78, 6),
    Cut(78, 2, last=40),
    Cut(78, 4, first=15),
    Cut(48, 4, vpp_size=3),
    Cut(48, 4, vpp_size=2, first=8, last=8),
    Cut(36, 1),
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_stages_are_those_of_megatron_core(cut: Cut) -> None:
    from slime.compat.megatron import prepare

    prepare()
    from megatron.core.transformer.transformer_config import TransformerConfig

    from slime.model.spec import stage_layers

    config = TransformerConfig(
        num_layers=cut.num_layers,
        hidden_size=64,
        num_attention_heads=4,
        pipeline_model_parallel_size=cut.pp_size,
        pipeline_dtype=torch.float32,
        virtual_pipeline_model_parallel_size=cut.vpp_size if cut.vpp_size > 1 else None,
        num_layers_in_first_pipeline_stage=cut.first,
        num_layers_in_last_pipeline_stage=cut.last,
    )
    for chunk in cut_layers(cut):
        vp_stage = chunk.vp_stage if cut.vpp_size > 1 else None
        assert stage_layers(config, vp_stage, chunk.pp_rank) == chunk.layers


@pytest.mark.parametrize("text", ["Et*10|t*12|t*8|t*12|t*8|t*12|t*8|t*8L", "Ettt|(tt|)*2,t|tL", "E|t*4|t*4|L"])
def test_layout_strings_are_read_as_megatron_core_reads_them(text: str) -> None:
    from slime.compat.megatron import prepare

    prepare()
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    theirs = [part.count(LayerType.decoder) for part in PipelineParallelLayerLayout.parse_str_to_list(text)]
    ours = cut_layers(Cut(sum(theirs), len(theirs), layout=text))
    assert [len(chunk.layers) for chunk in ours] == theirs


def test_tiles_of_logits_are_those_of_the_operator() -> None:
    assert (memory.HEAD_ROWS, memory.HEAD_WORDS) == (vocab_logprob.DEFAULT_ROWS, vocab_logprob.VOCAB_TILE)


def test_bounds_of_the_sparse_operators_are_their_own() -> None:
    assert (memory.STAGING_BYTES, memory.SCORES_BYTES) == (hopper_ops.STAGING_BYTES, hopper_ops.WORKSPACE_BYTES)


def test_shards_have_the_sizes_of_the_models_own_rule() -> None:
    grid = Grid(world=8, tp=4, pp=1, cp=1, ep=2, etp=1)
    for name in ("GLM-5.2", "Qwen3-4B", "Qwen3-30B-A3B"):
        table = NameTable.for_model(known_config(f"/x/{name}"), with_mtp=False)
        for entry in table.entries[:60]:
            size = grid.etp if entry.expert is not None else grid.tp
            assert local_numel(entry, grid) == torch.Size(shard_shape(entry, size)).numel(), entry.name


def test_fp8_tensors_are_those_of_the_wire_format() -> None:
    hf = known_config("/x/GLM-5.2-FP8")
    form, kept = Format.of(hf), hf.fp8_exceptions
    wire = WireFormat.of_checkpoint(hf)
    table = NameTable.for_model(hf)
    assert form.block == wire.fp8_block == 128
    assert {t.name for t in table.hf_tensors() if t.fp8 and t.name.removesuffix(".weight") not in kept} == set(wire.fp8_names)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tools.make_tiny_checkpoint import main

    folder = tmp_path_factory.mktemp("tiny")
    main(["--preset", "cpu", "--seed", "5", "--output", str(folder)])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "grid"),
    [
        ({"tp": 2, "pp": 2, "first": 6, "ep": 2}, Grid(4, 2, 2, 1, 2, 1)),
        ({"pp": 2, "first": 2, "ep": 2}, Grid(4, 1, 2, 1, 2, 1)),
        ({"tp": 2, "cp": 2}, Grid(4, 2, 1, 2, 1, 1)),
        ({"tp": 2, "pp": 2, "first": 6, "ep": 2, "mtp": True}, Grid(4, 2, 2, 1, 2, 1)),
    ],
    ids=["tp2 pp2 ep2", "pp2 ep2 dp2", "tp2 cp2", "tp2 pp2 ep2 mtp"],
)
def test_the_plan_is_the_stream_of_real_ranks(tiny: Path, layout: dict, grid: Grid) -> None:
    """The digest, and every bucket's names and bytes on the GPUs of two engines, from ranks that know of no flags."""
    from model.parity import build
    from ranks import run_ranks

    from slime.device.host import HostDevice
    from slime.ray.destinations import Destinations
    from slime.ray.weight_stream import WeightStream

    hf, limit, mtp = read_hf_config(tiny / "fp8"), 200_000, "mtp" in layout
    receivers = (Receiver(0, (0, 1), 2, ep=2, drafts=mtp), Receiver(1, (3,), 1))

    def stream(rank: int) -> tuple:
        chunks, ranks, _, _ = build(rank, 4, str(tiny / "bf16"), **layout)
        sender = WeightStream(chunks, hf, ranks, HostDevice(), limit_bytes=limit, with_mtp=mtp)
        plan = sender._plan(hf, receivers, (0,) * 4)
        rounds = [
            [(gpu, meta.name, meta.nbytes) for gpu, bucket in buckets.items() for meta in bucket.metas]
            for buckets in sender._rounds(plan, range(4))
        ]
        assert sender.send(1, Destinations()).buckets == 0
        return plan_digest(plan), rounds

    by_rank = run_ranks(4, stream)
    # As a rehearsal makes it: of the flags alone.
    chunks = tuple(cut_layers(Cut(8, grid.pp, first=layout.get("first"))))
    table, trainer = NameTable.for_model(hf), Trainer(grid, chunks, mtp=mtp, padded_vocab=padded_vocab(hf, grid.tp))
    plan = plan_sync(table, hf, trainer, receivers, nodes=nodes_of(4, 2), limit_bytes=limit)
    assert {digest for digest, _ in by_rank} == {plan_digest(plan)}, "the digest of the run's own plan"
    assert plan.rounds > 3
    for number in range(plan.rounds):
        real = sorted(row for _, rounds in by_rank for row in rounds[number])
        assert real == sorted((gpu, meta.name, meta.nbytes) for gpu in range(4) for meta in plan.duties(gpu, number).metas)


def padded_vocab(hf: HfConfig, tp: int) -> int:
    """--make-vocab-size-divisible-by is 128."""
    return -(-hf["vocab_size"] // (128 * tp)) * 128 * tp


@pytest.mark.slow
@pytest.mark.parametrize("mtp", [False, True], ids=["main model", "mtp"])
def test_ranks_that_are_built_add_up_to_the_checkpoint(mtp: bool, flagship: Recipe, tmp_path: Path) -> None:
    """One data-parallel copy of two stages would take 64 ranks; a grid of 16 shows the same sum."""
    from slime.rehearse.checks.ranks import check_held, check_order, check_ranks, differences
    from slime.rehearse.findings import Findings
    from slime.rehearse.model.shares import stage_shares
    from slime.rehearse.reading import read

    recipe = (
        flagship.with_flag("--actor-num-nodes", "2")
        .with_flag("--context-parallel-size", "1")
        .with_flag("--tensor-model-parallel-size", "2")
    )
    recipe = recipe.with_flag("--expert-model-parallel-size", "2")
    if mtp:
        recipe = recipe.with_flag("--mtp-num-layers", "1").with_flag("--enable-mtp-training")
    findings = Findings()
    reading = read(recipe.written(tmp_path), findings)
    padded = reading.config.model.padded_vocab_size
    shares = stage_shares(reading.table, reading.chunks, reading.grid, padded_vocab=padded, mtp=mtp)
    built = check_ranks(reading, shares, findings)
    check_order(reading, built, findings)
    # With the layer the last stage has a copy of the embedding, which the checkpoint has once.
    assert built.unique == (753_329_921_024 + 154880 * 6144 if mtp else 743_377_000_704)
    assert built.num_ranks == 16 and not built.errors
    assert not [finding for finding in findings.of("violation") if finding.area in ("ranks", "weights")]
    trainer = Trainer(reading.grid, tuple(reading.chunks), mtp=mtp, padded_vocab=padded)
    found = build_weight_map(reading.table, reading.hf, trainer, [], None)
    check_held(reading, built, found, findings)
    # On one of the ranks that hold it an expert is left out, and a neighbour is said to have it.
    at = next(number for number, row in enumerate(found.rows) if row.name == "model.layers.40.mlp.experts.3.down_proj.weight")
    [part] = found.rows[at].holders.parts
    moved = replace(found.rows[at].holders, parts=(replace(part, ranks=(part.ranks[0] + 1, *part.ranks[1:])),))
    rows = (*found.rows[:at], replace(found.rows[at], holders=moved), *found.rows[at + 1 :])
    assert sorted(differences(reading.table, built, replace(found, rows=rows))) == [
        f"rank {rank} holds {has:,} numbers of decoder.layers.40.mlp.experts.linear_fc2.weight3, "
        f"the weight map has {should:,} there"
        for rank, has, should in ((part.ranks[0], 2048 * 6144, 0), (part.ranks[0] + 1, 0, 2048 * 6144))
    ]
    assert built.peak_bytes < 4 << 30
    assert [finding for finding in findings.of("ok") if finding.area == "ranks"]
    assert [finding for finding in findings.of("ok") if "every built rank holds" in finding.what]


@pytest.mark.slow
def test_tied_weights_over_stages_are_held_twice() -> None:
    """Qwen3-4B on 8 GPUs in 2 stages: the last stage's output layer is a copy of the embedding."""
    from slime.rehearse.options import Options
    from slime.rehearse.result import rehearse

    argv = [*one_node("qwen3-4B", "Qwen3-4B", tp="2", ep="1"), "--pipeline-model-parallel-size", "2"]
    done = rehearse(argv, Options(engine_version="0.5.23"))
    assert not [finding.line() for finding in done.findings.of("violation")]
    layer = 2560 * 128 * (2 * 32 + 2 * 8) + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128
    embedding = 152064 * 2560  # padded to a multiple of 128 x TP
    assert done.built.unique == 36 * layer + embedding + 2560 + embedding and done.built.num_ranks == 8
    assert [finding for finding in done.findings.of("ok") if "every built rank holds" in finding.what]
    [row] = [row for row in done.weights.rows if row.name == "model.embed_tokens.weight"]
    assert row.holders.text == "rows 0:76032@0-6/2;rows 76032:151936@1-7/2" and row.makers == tuple(range(8))


@pytest.mark.slow
def test_a_rank_that_cannot_be_built_is_named(flagship: Recipe, tmp_path: Path) -> None:
    from slime.rehearse.checks.ranks import build_ranks
    from slime.rehearse.findings import Findings
    from slime.rehearse.reading import read

    recipe = flagship.with_flag("--decoder-first-pipeline-num-layers", "15").with_flag(
        "--decoder-last-pipeline-num-layers", "15"
    )
    reading = read(recipe.written(tmp_path), Findings())
    built = build_ranks(reading, ranks=[40], processes=1)
    assert "pipeline stage 1 starts at layer 16" in built.errors[0]


OWN_GROUPS = """
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from slime.compat.megatron import prepare
prepare()
from megatron.core import parallel_state
from slime.rehearse.checks.rank_worker import _leave_out_other_groups

def groups(rank):
    dist.init_process_group("fake", rank=rank, world_size=32, store=FakeStore())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, context_parallel_size=2, expert_model_parallel_size=4,
        expert_tensor_parallel_size=1, create_gloo_process_groups=False,
    )
    found = [dist.get_process_group_ranks(group) for group in parallel_state._global_process_group_list[1:]]
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return found

whole = [groups(rank) for rank in (0, 13, 31)]
_leave_out_other_groups(parallel_state)
own = [groups(rank) for rank in (0, 13, 31)]
assert own == whole, (own, whole)
for mine in ([12, 13], [13, 15], [12, 13, 14, 15], [13, 29]):  # TP, CP, EP and PP of rank 13
    assert mine in own[1], (mine, own[1])
"""


@pytest.mark.slow
def test_a_built_rank_is_in_the_groups_that_megatron_core_makes_for_it() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", OWN_GROUPS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
