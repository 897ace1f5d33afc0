"""A plan is walked through element by element: who trained what comes from the model's own sharding, not from the planner."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from unittest.mock import patch

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from weights.loader import Loader

from slime.config.stages import Cut, cut_layers
from slime.engine.spec import EngineSpec
from slime.model.hf_config import HfConfig
from slime.model.layout import merge, shard, unmerge
from slime.model.names import Entry, NameTable
from slime.model.placement import Grid
from slime.weights import shares, wire
from slime.weights.plan import Delivery, Receiver, SyncPlan, Trainer, nodes_of, plan_sync

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [4, 4]}
PLAIN = {"vocab_size": 22, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 32}
LATENT = {
    **PLAIN, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4,
    "n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1, "quantization_config": FP8,
}  # fmt: skip
MODELS = {
    "glm_moe_dsa": {**LATENT, "index_topk": 4, "index_n_heads": 2, "index_head_dim": 8, "index_topk_freq": 2},
    "qwen3_moe": {**PLAIN, "num_key_value_heads": 4, "head_dim": 4, "num_experts": 8, "moe_intermediate_size": 16},
    "qwen3": {**PLAIN, "num_key_value_heads": 4, "head_dim": 4, "tie_word_embeddings": True, "quantization_config": FP8},
    "glm4": {**PLAIN, "num_key_value_heads": 4, "head_dim": 4, "torch_dtype": "float32"},
    # 24 rows of gate and up over 4 ranks: pieces of 3, which cut the blocks.
    "odd glm4": {**PLAIN, "num_key_value_heads": 4, "head_dim": 4, "intermediate_size": 12, "quantization_config": FP8},
}


@dataclass(frozen=True)
class Case:
    model: str
    grid: Grid
    virtual: int
    """Chunks of each pipeline stage."""
    mtp: bool
    receivers: tuple[Receiver, ...]
    gpus_per_node: int
    limit: int
    piece: int

    @property
    def hf(self) -> HfConfig:
        return HfConfig({**MODELS[self.model], "model_type": self.model.split()[-1]})

    @property
    def num_gpus(self) -> int:
        return max([self.grid.world, *(gpu + 1 for receiver in self.receivers for gpu in receiver.gpus)])

    def plan(self) -> SyncPlan:
        chunks = tuple(cut_layers(Cut(4, self.grid.pp, self.virtual)))
        with patch.object(wire, "SMALLEST_PIECE", self.piece):  # as large models have many pieces, here small ones have
            return plan_sync(
                NameTable.for_model(self.hf),
                self.hf,
                Trainer(self.grid, chunks, mtp=self.mtp, padded_vocab=24),
                self.receivers,
                nodes=nodes_of(self.num_gpus, self.gpus_per_node),
                limit_bytes=self.limit,
            )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    model = draw(st.sampled_from(sorted(MODELS)))
    tp, pp, cp, dp = (draw(st.sampled_from(sizes)) for sizes in ((1, 2, 4), (1, 2, 4), (1, 2), (1, 2)))
    world = tp * pp * cp * dp
    has_experts = "num_experts" in MODELS[model] or "n_routed_experts" in MODELS[model]
    pairs = [(ep, etp) for ep in (1, 2, 4, 8) for etp in (1, 2) if world // pp % (ep * etp) == 0]
    ep, etp = draw(st.sampled_from(pairs)) if has_experts else (1, tp)
    first = draw(st.sampled_from((0, world // 2, world)))
    receivers = []
    for number in range(draw(st.integers(1, 3))):
        size = draw(st.sampled_from((1, 2, 4)))
        stages = draw(st.sampled_from((1, 1, 1, 2)))
        shards = draw(st.sampled_from([one for one in (1, 2, 4) if size % one == 0])) if has_experts else 1
        gpus = tuple(range(first, first + size * stages))
        first += size * stages
        fixed = draw(st.booleans())
        told = {
            "drafts": draw(st.booleans()),
            "fixed_experts": fixed,
            "cuts": draw(st.booleans()),
            "cuts_head": draw(st.booleans()),
        }
        receivers.append(Receiver(number, gpus, size, stages, shards, **told))
    return Case(
        model,
        Grid(world, tp, pp, cp, ep, etp),
        draw(st.sampled_from((1, 2))) if pp == 2 else 1,
        draw(st.booleans()) and model == "glm_moe_dsa",
        tuple(receivers),
        draw(st.sampled_from((1, 2, 4, 8))),
        draw(st.sampled_from((1, 700, 3000, 20000))),
        draw(st.sampled_from((100, 2**20))),
    )


@cache
def _numbered(entry: Entry) -> Tensor:
    """The whole trained tensor, every element the number of its place in the HF tensors one after another."""
    start, pieces = 0, []
    for tensor in entry.hf:
        size = torch.Size(tensor.shape).numel()
        pieces.append(torch.arange(start, start + size).reshape(tensor.shape))
        start += size
    return merge(entry, pieces)


def _held(case: Case, plan: SyncPlan, entry: Entry, ranks: tuple[int, ...]) -> dict[str, Tensor]:
    """Of every HF tensor and scale of an entry, which elements these ranks hold together, by the model's own rule."""
    whole = _numbered(entry)
    mask = torch.zeros(whole.numel(), dtype=torch.bool)
    grid = case.grid
    for rank in ranks:
        place = grid.place(rank)
        if not _is_on(case, entry, place):
            continue
        number, size = (place["etp"], grid.etp) if entry.expert is not None else (place["tp"], grid.tp)
        # Padding rows of a vocabulary are told by -1.
        mine = shard(entry, whole + 1, number, size, padded_vocab=24).reshape(-1) - 1
        mask[mine[mine >= 0]] = True
    found: dict[str, Tensor] = {}
    for tensor, piece in zip(entry.hf, unmerge(entry, mask[whole.reshape(-1)].reshape(whole.shape)), strict=True):
        found[tensor.name] = piece
        if plan.wire.form.is_fp8(tensor):
            rows, columns = piece.shape
            blocks = torch.nn.functional.pad(piece, (0, -columns % 4, 0, -rows % 4), value=True)
            found[tensor.scale_name] = blocks.unfold(0, 4, 4).unfold(1, 4, 4).all(-1).all(-1)
    return found


def _is_on(case: Case, entry: Entry, place: dict[str, int]) -> bool:
    """Does a rank have (its shard of) an entry: by its pipeline stage and its experts."""
    grid, last = case.grid, case.grid.pp - 1
    tied = bool(case.hf.get("tie_word_embeddings"))
    if entry.name.startswith("embedding."):
        stages = {0, last} if case.mtp or tied else {0}
    elif entry.name.startswith("decoder.layers."):
        chunk = int(entry.name.split(".")[2]) // (4 // grid.pp // case.virtual)
        stages = {chunk % grid.pp}
    else:
        stages = {last}
    if entry.expert is not None and entry.expert not in range(place["ep"] * 8 // grid.ep, (place["ep"] + 1) * 8 // grid.ep):
        return False
    return place["pp"] in stages


def _kept(case: Case) -> dict[int, set[str]]:
    """GPU -> Megatron names that its engine rank loads, by SGLang's rules."""
    table = NameTable.for_model(case.hf)
    found: dict[int, set[str]] = {}
    for receiver in case.receivers:
        for rank, gpu in enumerate(receiver.gpus):
            stage, tp_rank = divmod(rank, receiver.tp)
            shard_of_experts = tp_rank // (receiver.tp // receiver.ep)
            mine = range(shard_of_experts * 8 // receiver.ep, (shard_of_experts + 1) * 8 // receiver.ep)
            for entry in table.entries:
                if entry.is_mtp and not (case.mtp and receiver.drafts):
                    continue
                if entry.expert is not None and receiver.fixed_experts and entry.expert not in mine:
                    continue
                ends = entry.name.startswith(("embedding.", "output_layer."))
                on = (0, receiver.pp - 1) if ends else (receiver.pp - 1,)
                if entry.name.startswith("decoder.layers."):
                    on = (int(entry.name.split(".")[2]) // (4 // receiver.pp),)
                if stage in on:
                    found.setdefault(gpu, set()).add(entry.name)
    return found


def _walk(case: Case, plan: SyncPlan) -> None:
    kept = _kept(case)
    receiver_of = {gpu: receiver for receiver in case.receivers for gpu in receiver.gpus}
    loader = Loader(4 if "quantization_config" in case.hf else None, padding=4, mlp=4, expert=4)
    arrived: Counter[tuple[int, str]] = Counter()
    for number in range(plan.rounds):
        duties = [plan.duties(gpu, number) for gpu in range(case.num_gpus)]
        for gpu, mine in enumerate(duties):
            _check_buffers(case, plan, gpu, mine)
            _check_moves(plan, gpu, number)
            arrived.update((gpu, meta.name) for meta in mine.metas)
        counts: dict[tuple[int, str], Tensor] = {
            (gpu, meta.name): torch.zeros(meta.shape, dtype=torch.int32)
            for gpu, mine in enumerate(duties)
            for meta in mine.metas
        }
        has: set[tuple[int, int]] = set()
        for gpu, mine in enumerate(duties):
            for delivery in mine.makes:
                _check_made(case, plan, delivery, gpu)
                has.add((gpu, delivery.number))
                if delivery not in mine.staged:
                    _count(plan, delivery, gpu, counts)
        for hop in range(plan.hops):
            got: list[tuple[int, int]] = []
            for gpu, mine in enumerate(duties):
                for delivery, target in mine.sends(hop):
                    assert (gpu, delivery.number) in has, "sent before it was there"
                    assert (delivery, gpu) in duties[target].receives(hop)
                    _count(plan, delivery, target, counts)
                    got.append((target, delivery.number))
            has.update(got)
        for (gpu, name), count in counts.items():
            wanted = torch.zeros_like(count)
            wanted[loader.share(receiver_of[gpu], gpu, name, count.shape)] = 1
            assert torch.equal(count, wanted), (number, gpu, name, count)
    expected = {
        (gpu, name): 1
        for gpu, names in kept.items()
        for name in (tensor.name for one in names for tensor in plan.wire.tensors(NameTable.for_model(case.hf)[one]))
    }
    assert arrived == expected


def _count(plan: SyncPlan, delivery: Delivery, gpu: int, counts: dict[tuple[int, str], Tensor]) -> None:
    nbytes = 0
    for piece in plan.pieces(delivery):
        assert piece.offset == nbytes
        nbytes += -(-piece.nbytes // 16) * 16
        count = counts[gpu, piece.tensor.name]
        for start, stop in piece.tensor.parts[delivery.part]:
            count.narrow(piece.tensor.axis, start, stop - start).add_(1)
    assert nbytes == delivery.nbytes


def _check_made(case: Case, plan: SyncPlan, delivery: Delivery, gpu: int) -> None:
    """Whoever makes a part has it, or gathers it with its tensor-parallel group."""
    lane = plan.lanes[delivery.lane]
    place = case.grid.place(gpu)
    for piece in plan.pieces(delivery):
        ranks: tuple[int, ...] = (gpu,)
        if lane.gathered:
            axis, other = ("etp", "edp") if piece.entry.expert is not None else ("tp", "cp")
            alike = [key for key in ("pp", "ep", "edp") if key != axis] if other == "edp" else ["pp", "cp", "dp"]
            every = range(case.grid.world)
            ranks = tuple(rank for rank in every if all(case.grid.place(rank)[key] == place[key] for key in alike))
        held = _held(case, plan, piece.entry, ranks)[piece.tensor.name]
        for start, stop in piece.tensor.parts[delivery.part]:
            assert held.narrow(piece.tensor.axis, start, stop - start).all(), (gpu, piece.tensor.name)


def _check_moves(plan: SyncPlan, gpu: int, number: int) -> None:
    """Every byte beside the bucket that belongs into it goes to its place, once; nothing else is copied."""
    mine, wanted, found = plan.duties(gpu, number), {}, []
    for move in plan.moves(gpu, number):
        sources, targets = (
            _addresses(move.shape, steps, first, move.word)
            for steps, first in ((move.source_steps, move.source), (move.target_steps, move.target))
        )
        found += zip(targets, sources, strict=True)
    for delivery in mine.deliveries:
        if delivery.number in mine.places or delivery in mine.staged:
            continue
        for piece in plan.pieces(delivery):
            tensor, width = piece.tensor, wire.ITEM_BYTES[piece.tensor.dtype]
            whole = mine.starts[tensor.name] + torch.arange(tensor.nbytes).reshape(*tensor.shape, width)
            part = torch.cat([whole.narrow(tensor.axis, a, b - a) for a, b in tensor.parts[delivery.part]], tensor.axis)
            first = mine.beside[delivery.number] + piece.offset
            wanted |= dict(zip(part.reshape(-1).tolist(), range(first, first + piece.nbytes), strict=True))
    assert len(found) == len(wanted) and dict(found) == wanted


def _addresses(shape: tuple[int, ...], steps: tuple[int, ...], first: int, word: int) -> list[int]:
    words = sum(
        (torch.arange(size).mul(step).reshape(-1, *[1] * (len(shape) - axis - 1)) for axis, (size, step) in enumerate(
            zip(shape, steps, strict=True)
        )),
        torch.tensor(first),
    )  # fmt: skip
    return (words.reshape(-1, 1) * word + torch.arange(word)).reshape(-1).tolist()


def _check_buffers(case: Case, plan: SyncPlan, gpu: int, mine) -> None:
    ends = [meta.start + meta.nbytes for meta in mine.metas]
    assert all(meta.start % 16 == 0 for meta in mine.metas)
    assert all(end <= meta.start for end, meta in zip(ends, mine.metas[1:], strict=False))
    units = {(d.lane, unit) for d in mine.deliveries if gpu in plan.lanes[d.lane].gpus for unit in d.units}
    assert mine.bucket_bytes <= case.limit or len(units) == 1
    staged = sum(delivery.nbytes for delivery in mine.staged)
    assert staged <= case.limit or len({(d.lane, unit) for d in mine.staged for unit in d.units}) == 1


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_every_byte_arrives_once_from_a_rank_that_has_it(case: Case) -> None:
    with patch.multiple(shares, VOCAB_PADDING=4, MLP_ALIGNMENT=4, EXPERT_ALIGNMENT=4):  # of the size of these models
        plan = case.plan()
        _walk(case, plan)
        assert plan.digest == case.plan().digest


def test_parts_of_all_experts_are_put_in_their_places_by_as_few_copies_as_those_of_few() -> None:
    case = Case("glm_moe_dsa", Grid(2, 2, 1, 1, 2, 1), 1, False, (Receiver(0, (0, 1), 2, cuts=True),), 2, 1 << 30, 100)
    moves, parts = [], []
    for experts in (8, 32):
        changed = MODELS | {"glm_moe_dsa": MODELS["glm_moe_dsa"] | {"n_routed_experts": experts}}
        with patch.dict(MODELS, changed), patch.multiple(shares, VOCAB_PADDING=4, MLP_ALIGNMENT=4, EXPERT_ALIGNMENT=4):
            plan = case.plan()
            mine = plan.duties(0, 0)
            moved = [one for one in mine.deliveries if one.number in mine.beside and one not in mine.staged]
            moves.append(len(plan.moves(0, 0)))
            parts.append(sum(len(tuple(plan.pieces(one))) for one in moved))
            _check_moves(plan, 0, 0)
    # Three layers of experts, codes and scales of three matrices each: the rank keeps a half of all of them.
    assert moves[0] == moves[1] and parts[1] - parts[0] == 3 * (32 - 8) * 6


def test_an_engine_is_given_whole_tensors_where_not_every_matrix_is_cut_over_all_ranks() -> None:
    plain = EngineSpec(
        "default", "regular", 3, 2, 2, 1, 2, 1, 1, 1, "m", True, True, 0, {"attention_backend": "fa3", "ep_size": "1"}
    )
    assert Receiver.of(plain, first_gpu=8) == Receiver(3, (10, 11), 2, cuts=True, cuts_head=True)
    assert not Receiver.of(replace(plain, num_gpus=1, tp_size=1), first_gpu=0).cuts
    otherwise = [
        ("enable_dp_attention", "true"), ("attn_cp_size", "2"), ("moe_dense_tp_size", "1"), ("moe_a2a_backend", "deepep"),
        ("speculative_moe_a2a_backend", "deepep"), ("enable_prefill_cp", True), ("dwdp_size", "2"), ("dcp_size", "2"),
        ("enable_deepep_moe", "true"), ("enable_dense_mlp_attn_tp", "true"), ("elastic_ep_backend", "mooncake"),
        ("attention_context_parallel_size", "2"), ("enable_nsa_prefill_context_parallel", "true"),
    ]  # fmt: skip
    assert [name for name, value in otherwise if Receiver.of(replace(plain, settings={name: value}), first_gpu=0).cuts] == []
    for name, value in (("moe_a2a_backend", "none"), ("enable_dp_attention", "false"), ("disable_cuda_graph", "true")):
        assert Receiver.of(replace(plain, settings={name: value}), first_gpu=0).cuts, name


def test_the_output_layer_alone_is_cut_beside_data_parallel_attention() -> None:
    """Unless enable_dp_lm_head says otherwise, or an option is there beside which nobody looked."""
    recipe = {"enable_dp_attention": "true", "dp_size": 2, "moe_dense_tp_size": 1, "moe_a2a_backend": "deepep"}
    spec = EngineSpec("default", "regular", 0, 0, 2, 1, 2, 1, 2, 2, "m", True, True, 0, recipe)
    found = Receiver.of(spec, first_gpu=0)
    assert found.cuts_head and not found.cuts
    for name, value in (
        ("enable_dp_lm_head", "true"),
        ("attn_cp_size", 2),
        ("dcp_size", 2),
        ("elastic_ep_backend", "mooncake"),
    ):
        assert not Receiver.of(replace(spec, settings=recipe | {name: value}), first_gpu=0).cuts_head, name
    assert Receiver.of(replace(spec, settings=recipe | {"enable_dp_lm_head": "false"}), first_gpu=0).cuts_head
    assert not Receiver.of(replace(spec, num_gpus=1, tp_size=1), first_gpu=0).cuts_head
