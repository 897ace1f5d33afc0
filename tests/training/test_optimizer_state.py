"""The optimizer's state in a checkpoint: the values that megatron-core's own gathering gives, each made on one rank."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from gpu_ranks import run_processes
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from tiny import config_for, plans, rollout, start

from slime.model.dist_ckpt import sharded_model, sharding_metadata
from slime.training.optimizer import parts_of
from slime.training.optimizer_state import Slices


@given(st.data())
def test_slices_of_a_parameter_are_all_of_it_once(data):
    ranks = data.draw(st.integers(1, 9))
    share = data.draw(st.integers(1, 40))
    bucket = data.draw(st.integers(0, 100))
    start_, end = sorted(bucket + data.draw(st.integers(0, ranks * share)) for _ in range(2))
    held = [[place for place in range(start_, end) if (place - bucket) // share == rank] for rank in range(ranks)]
    slices = Slices.of(start_, end, bucket, share, ranks=ranks, rank=0)
    assert [list(range(*bounds)) for bounds in slices.bounds] == [[place - start_ for place in places] for places in held]
    assert len(held[slices.owner]) == max(map(len, held)) and slices.numel == sum(map(len, held))


@dataclass(frozen=True)
class Entry:
    key: str
    data: torch.Tensor
    replica_id: tuple[int, ...]
    address: int


@dataclass(frozen=True)
class Seen:
    """Of one rank, by (part of the optimizer, parameter's number, "param" or a moment)."""

    ours: dict[tuple[int, int, str], Entry]
    theirs: dict[tuple[int, int, str], Entry]
    held: dict[str, set[int]]
    """Addresses of the tensors that the optimizer keeps, by state."""


def both(rank: int, folder: Path, layout: dict) -> Seen:
    trainer = start(config_for(folder, params_dtype="bf16", **layout))
    batch = rollout(0)
    trainer.train(batch, plans(batch, trainer.config, trainer.ranks.world_size))
    model, metadata = sharded_model(trainer.model, trainer.ranks), sharding_metadata(trainer.ranks)
    ours, theirs, held = {}, {}, {"param": set(), "exp_avg": set(), "exp_avg_sq": set()}
    for number, part in enumerate(parts_of(trainer.optimizer)):
        megatron = functools.partial(type(part).sharded_param_state_fully_reshardable, part)
        for make, kept in ((part.sharded_param_state_fully_reshardable, ours), (megatron, theirs)):
            for index, entries in make(dict(model), False, metadata).items():
                for name, entry in entries.items():
                    found = Entry(entry.key, entry.data.clone(), tuple(entry.replica_id), entry.data.data_ptr())
                    kept[number, index, name] = found
        for parameter in part.model_param_gbuf_map:
            for name, tensor in part._get_main_param_and_optimizer_states(parameter).items():
                if name in held:
                    held[name].add(tensor.data_ptr())
    return Seen(ours, theirs, held)


EP2 = dict(expert_model_parallel_size=2, expert_tensor_parallel_size=1)


@pytest.mark.slow
@pytest.mark.parametrize("world, layout", [(2, EP2), (3, {}), (1, {})], ids=["EP2", "DP3", "one rank"])
def test_each_state_is_made_once_and_is_what_megatron_gathers(glm, world, layout):
    expect_once(run_ranks(world, both, glm, layout), has_experts_apart=bool(layout))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("layout", [EP2, {}], ids=["EP2", "DP2"])
def test_over_nccl_it_is_the_same(glm, tmp_path, layout):
    expect_once(run_processes(2, both, glm, layout, folder=tmp_path / "two"), has_experts_apart=bool(layout))


def expect_once(ranks: list[Seen], *, has_experts_apart: bool) -> None:
    # Experts of EP2 have data-parallel groups of one rank: the same number is another parameter on the other rank.
    wanted = {(entry.key, key, entry.replica_id[:2]) for seen in ranks for key, entry in seen.theirs.items()}
    made = [(entry.key, key, entry.replica_id[:2]) for seen in ranks for key, entry in seen.ours.items()]
    assert set(made) == wanted
    repeated = {key for key, count in Counter(made).items() if count > 1}
    assert all(".mlp.experts." in key[0] for key in repeated) and (has_experts_apart or not repeated)
    for seen in ranks:
        for key, entry in seen.ours.items():
            assert torch.equal(entry.data, seen.theirs[key].data) and entry.key == seen.theirs[key].key, key
            assert entry.replica_id[2] == 0


@pytest.mark.slow
def test_a_rank_that_holds_all_hands_out_what_it_has(glm):
    (seen,) = run_ranks(1, both, glm, {})
    assert {name for _, _, name in seen.ours} == set(seen.held)
    assert all(entry.address in seen.held[name] for (_, _, name), entry in seen.ours.items())
    assert not any(entry.address in seen.held[name] for (_, _, name), entry in seen.theirs.items())
