"""A plan carried out by real ranks with real models: every engine rank's buckets, to the bit, and the bytes of every link."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import by_hand
import pytest
import torch
from model.parity import build
from ranks import run_ranks
from weights.loader import Loader

from slime.config.stages import Cut, cut_layers
from slime.model.build import padded_vocab_size
from slime.model.hf_config import read_hf_config
from slime.model.hf_io import SafetensorsReader
from slime.model.names import NameTable
from slime.model.placement import Grid
from slime.weights import wire
from slime.weights.buckets import unpack_bucket
from slime.weights.execute import Execution
from slime.weights.parts import TrainedParts
from slime.weights.plan import Delivery, Receiver, SyncPlan, Trainer, nodes_of, plan_sync
from slime.weights.quantize import WireFormat
from tools.make_tiny_checkpoint import GlmSize, Preset, write_checkpoint

pytestmark = pytest.mark.slow

LAYERS, EXPERTS = 4, 4
SMALL = GlmSize(num_hidden_layers=LAYERS, n_routed_experts=EXPERTS, first_k_dense_replace=1)
# Every matrix that two ranks share is cut on borders of FP8 blocks.
WHOLE_BLOCKS = GlmSize(
    num_hidden_layers=LAYERS, n_routed_experts=EXPERTS, first_k_dense_replace=1, hidden_size=128, intermediate_size=256,
    moe_intermediate_size=256, num_attention_heads=8, qk_nope_head_dim=96, qk_rope_head_dim=32, v_head_dim=32, q_lora_rank=128,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    layout: dict[str, object]
    receivers: tuple[Receiver, ...]
    size: str = "small"
    homes: dict[int, int] = field(default_factory=dict)
    """Trainer ranks that stand for GPUs beyond theirs."""
    gpus_per_node: int = 4
    limit: int = 300_000
    gathered: bool = True
    """Some tensors are put together before they are quantised."""
    world: int = 8

    def plan(self, folder: Path, padded_vocab: int) -> SyncPlan:
        hf, layout = read_hf_config(folder), self.layout
        grid = Grid(self.world, *(layout.get(name, 1) for name in ("tp", "pp", "cp", "ep", "etp")))
        chunks = tuple(cut_layers(Cut(LAYERS, grid.pp, layout.get("vpp", 1), layout.get("first"))))
        return plan_sync(
            NameTable.for_model(hf),
            hf,
            Trainer(grid, chunks, mtp=bool(layout.get("mtp")), padded_vocab=padded_vocab),
            self.receivers,
            nodes=nodes_of(self.world + len(self.homes), self.gpus_per_node),
            limit_bytes=self.limit,
        )


CASES = {
    "shared GPUs, engines of other sizes": Case(
        {"tp": 2, "pp": 2, "ep": 2},
        (Receiver(0, (0, 1), 2, ep=2), Receiver(1, (2,), 1), Receiver(2, (4, 5, 6, 7), 4, ep=2)),
    ),
    "cut on blocks, shared GPUs, drafts": Case(
        {"tp": 2, "pp": 2, "ep": 4, "mtp": True},
        (Receiver(0, (0, 1, 2, 3), 4, ep=4, drafts=True), Receiver(1, (4, 5), 2, ep=1)),
        size="whole blocks",
        gathered=False,
    ),
    "context parallel, other GPUs, one node each": Case(
        {"tp": 2, "pp": 2, "cp": 2, "ep": 4},
        (Receiver(0, (8, 9), 2, ep=2), Receiver(1, (10,), 1), Receiver(2, (3, 4), 2, ep=2)),
        homes={8: 0, 9: 5, 10: 2},
        gpus_per_node=1,
    ),
    "virtual stages": Case(
        {"tp": 2, "pp": 2, "vpp": 2, "ep": 2, "mtp": True, "send_indices": True},
        (Receiver(0, (0, 1), 2, ep=2, drafts=True), Receiver(1, (6,), 1)),
    ),
    "experts cut over tensor ranks, one large round": Case(
        {"tp": 2, "ep": 2, "etp": 2},
        (Receiver(0, (1, 2), 2, ep=2), Receiver(1, (6,), 1)),
        size="whole blocks",
        limit=1 << 30,
        gathered=False,
    ),
    "ranks load shares": Case(
        {"tp": 2, "cp": 2, "ep": 2},
        (
            Receiver(0, (0, 1), 2, cuts=True),
            Receiver(1, (4, 5, 6, 7), 4, ep=2, cuts=True),
            Receiver(2, (8, 9), 2, ep=2, cuts_head=True),
        ),
        size="whole blocks",
        homes={8: 3, 9: 0},
        gathered=False,
    ),
    "ranks load shares of what is gathered": Case(
        {"tp": 4, "pp": 2, "ep": 2},
        (Receiver(0, (0, 1), 2, cuts=True), Receiver(1, (2,), 1), Receiver(2, (5, 6), 2, ep=2, cuts=True)),
        size="whole blocks",
    ),
}
LARGE = {
    "prefill and decode, shares, everything mixed": Case(
        {"tp": 2, "pp": 2, "cp": 2, "ep": 4, "mtp": True},
        (
            Receiver(0, (0, 1), 2, cuts=True),
            Receiver(1, (2, 3, 4, 5), 4, ep=4, drafts=True),
            Receiver(2, (6,), 1, drafts=True),
            Receiver(3, (8, 9, 10, 11), 4, ep=2, drafts=True, cuts=True),
            Receiver(4, (16, 17), 2, ep=2, cuts=True),
        ),
        size="whole blocks",
        homes={16: 7, 17: 12},
        gathered=False,
        world=16,
    ),
    "engines of two stages": Case(
        {"tp": 4, "pp": 2, "ep": 2},
        (Receiver(0, (0, 1, 2, 3), 2, pp=2, cuts=True), Receiver(1, (7, 8, 9, 10), 2, pp=2, ep=2, cuts=True)),
        size="whole blocks",
        world=16,
    ),
}
ALL = CASES | (LARGE if by_hand.IS_SET else {})
"""Sixteen ranks by hand: 25 s of both cores."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, dict[str, Path]]:
    folder, made = tmp_path_factory.mktemp("execute"), {}
    for name, size in (("small", SMALL), ("whole blocks", WHOLE_BLOCKS)):
        made[name] = {kind: folder / name / kind for kind in ("bf16", "fp8")}
        for kind, path in made[name].items():
            write_checkpoint(path, Preset("glm", size, 1 << 20), seed=3, fp8=kind == "fp8")
    return made


def content(tensor: torch.Tensor) -> str:
    """Dtype, shape and the hash of the bytes: not every dtype travels between processes."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"


def loaded(receiver: Receiver, gpu: int, name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[Loader(128).share(receiver, gpu, name, tuple(tensor.shape))]


def carry_out(rank: int, cases: list[Case], folders: dict[str, dict[str, Path]]) -> list[tuple[dict, Counter]]:
    """Per case: (GPU -> name -> content of every bucket here, bytes over links from here)."""
    return [_carry_out(rank, case, folders[case.size]) for case in cases]


def _carry_out(rank: int, case: Case, made: dict[str, Path]) -> tuple[dict, Counter]:
    chunks, ranks, hf, config = build(rank, case.world, str(made["bf16"]), **case.layout)
    serving = read_hf_config(made["fp8"])
    plan = case.plan(made["fp8"], padded_vocab_size(config, hf))
    parts = TrainedParts(chunks, NameTable.for_model(serving), ranks, block=128)
    execution = Execution(plan, [*range(case.world), *case.homes.values()], rank, torch.device("cpu"), parts)
    held: dict[int, dict[str, str]] = {}
    for number in range(plan.rounds):
        for gpu, bucket in execution.round(number).items():
            receiver = next(one for one in case.receivers if gpu in one.gpus)
            named = {name: content(loaded(receiver, gpu, name, tensor)) for name, tensor in unpack_bucket(bucket)}
            assert bucket.nbytes <= case.limit and not named.keys() & held.setdefault(gpu, {}).keys()
            held[gpu] |= named
    return held, execution.moved


@pytest.fixture(scope="module", autouse=True)
def small_pieces():
    """Embedding and output layer are cut into pieces for several links, as large ones are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "SMALLEST_PIECE", 20_000)
        yield


@pytest.fixture(scope="module")
def done(folders) -> dict[str, list[tuple[dict, Counter]]]:
    """Case -> per rank."""
    found = {}
    for world in sorted({case.world for case in ALL.values()}):
        cases = {name: case for name, case in ALL.items() if case.world == world}
        by_rank = run_ranks(world, carry_out, list(cases.values()), folders)
        found |= {name: [rank[number] for rank in by_rank] for number, name in enumerate(cases)}
    return found


def served(case: Case, receiver: Receiver, gpu: int, made: dict[str, Path]) -> dict[str, torch.Tensor]:
    """What one engine rank must get, made of the whole tensors of the checkpoint."""
    hf, reader = read_hf_config(made["fp8"]), SafetensorsReader(made["bf16"])
    form, expected = WireFormat.of_checkpoint(hf), {}
    stage, rank = divmod(receiver.gpus.index(gpu), receiver.tp)
    layers = range(stage * LAYERS // receiver.pp, (stage + 1) * LAYERS // receiver.pp)
    each, number = EXPERTS // receiver.ep, rank // (receiver.tp // receiver.ep)
    mine = range(each * number, each * (number + 1))
    table = NameTable.for_model(hf, with_mtp=bool(case.layout.get("mtp")) and receiver.drafts)
    for entry in table.entries:
        at_an_end = entry.layer is None and (stage == receiver.pp - 1 or entry.name.startswith(("embedding.", "output_layer.")))
        if (entry.layer in layers or at_an_end) and (entry.expert is None or entry.expert in mine):
            for tensor in entry.hf:
                expected.update(form.encode(tensor.name, reader.read(tensor, torch.float32)))
    return expected


@pytest.mark.parametrize("name", ALL)
def test_every_engine_rank_gets_what_it_serves_once_and_to_the_bit(name, done, folders):
    case = ALL[name]
    held = {gpu: named for here, _ in done[name] for gpu, named in here.items()}
    assert sorted(held) == sorted(gpu for receiver in case.receivers for gpu in receiver.gpus)
    for receiver in case.receivers:
        for gpu in receiver.gpus:
            expected = served(case, receiver, gpu, folders[case.size])
            assert held[gpu] == {name: content(loaded(receiver, gpu, name, value)) for name, value in expected.items()}, gpu


@pytest.mark.parametrize("name", ALL)
def test_every_link_carries_the_planned_bytes(name, done, folders):
    case, planned = ALL[name], Counter()
    plan = case.plan(folders[case.size]["fp8"], 320)
    for _, _, source, target, nbytes in plan.transfers():
        planned[source, target] += nbytes
    moved = sum((counts for _, counts in done[name]), Counter())
    assert moved == planned and planned
    assert any(lane.gathered for lane in plan.lanes) is case.gathered
    embedding = {delivery.part for delivery in plan.deliveries if _has_embedding(plan, delivery)}
    assert (len(embedding) > case.layout["tp"]) is (case.limit < 1 << 30), "with small buckets pieces of it take several links"


def _has_embedding(plan: SyncPlan, delivery: Delivery) -> bool:
    units = plan.lanes[delivery.lane].units
    return any(entry.name.startswith("embedding.") for unit in delivery.units for entry in units[unit].entries)
