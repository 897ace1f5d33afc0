"""No hang: whatever a rank has to do, and if it is nothing, all ranks of a group ask the same of it in the same order."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist
from collectives import mismatches, recorded
from ranks import run_ranks
from tiny import config_for, plans, rollout, start

pytestmark = pytest.mark.slow

PIPELINE = dict(pipeline_model_parallel_layout="Et|t|tttt|ttL")  # layers 1 to 3 are dense: stages 0 and 1 have no MoE layer
LAYOUTS: dict[int, dict[str, dict]] = {
    4: {
        "PP4, two stages without experts": dict(pipeline_model_parallel_size=4, **PIPELINE),
        "PP2 VPP2 EP2": dict(
            pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, expert_model_parallel_size=2, **PIPELINE
        ),
        "CP4 EP4, ranks without a row": dict(context_parallel_size=4, allgather_cp=True, expert_model_parallel_size=4),
        "DP4 EP4, ranks without a sample": dict(
            expert_model_parallel_size=4, use_dynamic_batch_size=True, max_tokens_per_gpu=4096
        ),
    },
    8: {
        "TP2 PP2 CP2 EP4": dict(
            tensor_model_parallel_size=2, pipeline_model_parallel_size=2, context_parallel_size=2, allgather_cp=True,
            expert_model_parallel_size=4, decoder_first_pipeline_num_layers=2,
        ),
    },
}  # fmt: skip


def awkward():
    """Three samples, each a micro-batch: one of two tokens, one with no trained token, one longer than both together."""
    batch = rollout(n=3, longest=30)
    tokens = (np.array([5, 6]), *batch.tokens[1:])
    masks = (np.ones(1, np.float32), np.zeros_like(batch.loss_masks[1]), batch.loss_masks[2])
    return dataclasses.replace(
        batch,
        tokens=tokens,
        loss_masks=masks,
        response_lengths=np.array([1, *batch.response_lengths[1:]]),
        rollout_log_probs=(np.array([-4.0], np.float32), *batch.rollout_log_probs[1:]),
    )


def train(rank: int, folder, world: int, layouts: dict) -> dict:
    results, batch = {}, awkward()
    for name, changes in layouts.items():
        alone = dict(use_dynamic_batch_size=False, micro_batch_size=1, data_pad_size_multiplier=1, global_batch_size=3)
        sequence_parallel = changes.get("tensor_model_parallel_size", 1) > 1
        config = config_for(
            folder, sequence_parallel=sequence_parallel, expert_tensor_parallel_size=1, clip_grad=0.1, **{**alone, **changes}
        )
        trainer = start(config)
        with recorded() as record:
            report = trainer.train(batch, plans(batch, config, world))
        results[name] = (record, report.per_step[0])
    return results


_DONE: dict = {}


def _results(folder, world: int, layouts: dict) -> list[dict]:
    if world not in _DONE:
        _DONE[world] = run_ranks(world, train, folder, world, layouts, timeout=400)
    return _DONE[world]


@pytest.mark.parametrize(
    ("world", "name"), [pytest.param(world, name, id=name) for world in LAYOUTS for name in LAYOUTS[world]]
)
def test_every_rank_of_a_group_calls_the_same_collectives_and_gets_the_same_step(glm, world, name):
    results = [result[name] for result in _results(glm, world, LAYOUTS[world])]
    records = [record for record, _ in results]
    for record in records:
        asked = [*record.collectives.values(), *record.sent.values(), *record.received.values()]
        assert sum(len(calls) for calls in asked) > 10, "the recorder was there"
    assert mismatches(records) == []
    (alone,) = _results(glm, 1, {"alone": {}})
    for _, step in results:
        for metric, value in alone["alone"][1].items():
            assert step[metric] == pytest.approx(value, rel=1e-5, abs=1e-6), metric


def test_a_sequence_that_differs_is_found():
    def differ(rank: int):
        with recorded() as record:
            dist.all_reduce(torch.ones(2, 3))
            dist.all_reduce(torch.ones(4) if rank else torch.ones(2, 2))
            dist.send(torch.ones(6), 1) if rank == 0 else dist.recv(torch.ones(2, 3), 0)
            dist.barrier()
        return record

    first, second = run_ranks(2, differ)
    shapes, traffic = mismatches([first, second])
    assert "rank 0 and rank 1 differ at call 1: ('allreduce', (('torch.float32', (2, 2)),)) and" in shapes
    assert traffic.startswith("sent from rank 0 and received by rank 1 differ at call 0")
    shorter = copy.deepcopy(first)
    (calls,) = shorter.collectives.values()
    calls.pop()
    shorter.sent.clear(), first.received.clear()
    second = dataclasses.replace(first, rank=1, sent={})
    assert mismatches([shorter, second]) == ["group 0 of ranks [0, 1]: rank 0 and rank 1 differ at call 2: 2 calls and 3"]
