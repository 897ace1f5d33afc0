"""What an engine's ranks take in by a plan, beside what they serve by the rehearsal's memory model, class by class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from slime.config.stages import Cut, cut_layers
from slime.engine.spec import EngineSpec
from slime.model.hf_config import HfConfig
from slime.model.names import Entry, NameTable
from slime.model.placement import Grid
from slime.rehearse.known_models import known_config
from slime.rehearse.model.keepers import Keepers
from slime.weights.plan import Receiver, SyncPlan, Trainer, nodes_of, plan_sync
from slime.weights.wire import Format


@dataclass(frozen=True)
class Case:
    model: str
    trainer: Trainer
    engine: EngineSpec

    @property
    def hf(self) -> HfConfig:
        return known_config(f"/any/{self.model}")


def _engine(tp: int, *, ep: int = 1, dp: int = 1, **settings: object) -> EngineSpec:
    settings |= {"enable_dp_attention": "true", "dp_size": dp} if dp > 1 else {}
    return EngineSpec(
        "default", "regular", 0, 0, tp, -(-tp // 8), tp, 1, dp, ep, "", update_weights=True, needs_offload=True, random_seed=0,
        settings=settings,
    )  # fmt: skip


def cases(flagship: Trainer) -> dict[str, Case]:
    two = Trainer(Grid(world=8, tp=2, pp=1, cp=1, ep=1, etp=2), tuple(cut_layers(Cut(36, 1))), padded_vocab=152_064)
    recipe = _engine(64, ep=64, dp=64, moe_dense_tp_size=1, moe_a2a_backend="deepep", enable_dp_lm_head="true")
    return {
        "GLM-5.2, engines of 64, attention data-parallel, experts apart": Case("GLM-5.2-FP8", flagship, recipe),
        "GLM-5.2, the same without --enable-dp-lm-head": Case(
            "GLM-5.2-FP8", flagship, _engine(64, ep=64, dp=64, moe_dense_tp_size=1, moe_a2a_backend="deepep")
        ),
        "GLM-5.2, engines of 16, plain tensor parallelism": Case("GLM-5.2-FP8", flagship, _engine(16)),
        "GLM-5.2, engines of 16, experts apart": Case("GLM-5.2-FP8", flagship, _engine(16, ep=16)),
        "Qwen3-4B, engines of 2": Case("Qwen3-4B", two, _engine(2)),
    }


@dataclass(frozen=True)
class Row:
    """GB of the rank that takes in the most beyond what it serves; all classes together, or one."""

    taken: float
    served: float


def rows(case: Case) -> dict[str, Row]:
    """Class of tensors -> its row, `all` the first."""
    hf = case.hf
    table, receiver = NameTable.for_model(hf), Receiver.of(case.engine, first_gpu=0)
    nodes = nodes_of(max(case.trainer.grid.world, len(receiver.gpus)), 8)
    plan = plan_sync(table, hf, case.trainer, [receiver], nodes=nodes, limit_bytes=2**31)
    taken, served = _taken(plan), dict(_served(case, table, receiver))
    worst = max(receiver.gpus, key=lambda gpu: taken[gpu].total() / served[gpu].total())
    found = {"all": Row(taken[worst].total() / 1e9, served[worst].total() / 1e9)}
    return found | {kind: Row(taken[worst][kind] / 1e9, served[worst][kind] / 1e9) for kind in sorted(served[worst])}


def _taken(plan: SyncPlan) -> dict[int, Counter[str]]:
    """GPU -> bytes that reach its bucket, over links or made there."""
    found: dict[int, Counter[str]] = {gpu: Counter() for gpu in range(len(plan.nodes))}
    for delivery in plan.deliveries:
        lane, kinds = plan.lanes[delivery.lane], Counter[str]()
        for unit in delivery.units:
            kinds[_kind(lane.units[unit].entries[0])] += lane.units[unit].part_bytes[delivery.part]
        for gpu in lane.keepers[delivery.part]:
            found[gpu].update(kinds)
    return found


def _served(case: Case, table: NameTable, receiver: Receiver) -> Iterator[tuple[int, Counter[str]]]:
    """GPU -> bytes that its engine rank keeps."""
    form, sizes = Format.of(case.hf), {"num_experts": case.hf.num_experts, "num_layers": case.hf.num_layers}
    alike: Counter[tuple[tuple[int, ...], str]] = Counter()
    for entry in table.entries:
        if not entry.is_mtp or case.trainer.mtp:
            nbytes = sum(form.nbytes(entry, tensor) / Keepers.cut(entry, tensor, case.engine) for tensor in entry.hf)
            alike[receiver.keepers(entry, **sizes), _kind(entry)] += nbytes
    for gpu in receiver.gpus:
        found = Counter[str]()
        for (gpus, kind), nbytes in alike.items():
            found[kind] += nbytes if gpu in gpus else 0
        yield gpu, found


def _kind(entry: Entry) -> str:
    if entry.expert is not None:
        return "routed experts"
    if entry.split == "none":
        return "what is never cut"
    names = {
        "embedding.": "embedding",
        "output_layer.": "output layer",
        ".shared_experts.": "shared experts",
        ".mlp.": "dense MLP",
    }
    return next((kind for part, kind in names.items() if part in entry.name), "attention")
