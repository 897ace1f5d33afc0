"""What the optimizer's flags may not change: the gradients, the weights that leave after a step, and what sleeps."""

from __future__ import annotations

import dataclasses
import inspect
import os
import textwrap

import pytest
import torch
from ranks import run_ranks
from tiny import config_for, plans, rollout, start

import slime.training.optimizer
from slime.training import memory
from slime.training.optimizer import optimizer_modes, step_threads, usable_cores

pytestmark = pytest.mark.slow


def sleeping(rank: int, folder, dtype: str) -> tuple[int, int]:
    config = config_for(folder, params_dtype=dtype)
    trainer = start(config)
    batch = rollout()
    trainer.train(batch, plans(batch, config, 1))
    asleep = memory.step_tensors(trainer) | memory.gradient_tensors(trainer)
    for name, tensor in asleep.items():
        tensor.untyped_storage().fill_(0xFF)
        assert "gradients" in name or dtype == "bf16" or "exp_avg" in name or "step" in name, name
    weights = [weight for _, weight in trainer.named_weights()]
    return sum(int(weight.isnan().sum()) for weight in weights), len(asleep)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_survive_while_everything_that_only_steps_need_is_gone(qwen3, dtype):
    destroyed, count = run_ranks(1, sleeping, qwen3, dtype)[0]
    assert destroyed == 0 and count > 30


def two_rollouts(rank: int, folder, changes: dict, spoil: bool = False, world: int = 2) -> tuple:
    config = config_for(folder, lr=1e-3, **changes)
    trainer = start(config)
    reports, counts = [], []
    for rollout_id, tokens in enumerate((4096, 24)):
        config.batch = dataclasses.replace(config.batch, max_tokens_per_gpu=tokens)
        batch = rollout(rollout_id)
        steps = plans(batch, config, world)
        counts.append(len(steps[0].micro_batches[0]))
        reports.append(trainer.train(batch, steps).per_step)
        for gradients in memory.gradient_tensors(trainer).values() if spoil else ():
            gradients.untyped_storage().fill_(0xFF)
    return counts, reports, {name: weight.clone() for name, weight in trainer.named_weights()}


def test_what_gradient_buffers_hold_between_rollouts_is_never_read(qwen3):
    # The device does not keep it while the trainer sleeps.
    (_, steps, weights), (_, spoiled_steps, spoiled) = (
        run_ranks(2, two_rollouts, qwen3, {}, spoil)[0] for spoil in (False, True)
    )
    assert spoiled_steps == steps
    assert [name for name, weight in weights.items() if not torch.equal(weight, spoiled[name])] == []


OVERLAPS = {
    "gradients": dict(overlap_grad_reduce=True),
    "gradients and parameters": dict(overlap_grad_reduce=True, overlap_param_gather=True),
}


DRAFTING = dict(pipeline_model_parallel_size=2, mtp_num_layers=1, enable_mtp_training=True)
"""Stages of two data-parallel ranks each, the last with a prediction layer and a copy of the embedding."""


@pytest.mark.parametrize(
    ("model", "world", "changes", "overlap"),
    [*(pytest.param("qwen3", 2, {}, overlap, id=overlap) for overlap in OVERLAPS),
     pytest.param("glm_mtp", 4, DRAFTING, "gradients", id="gradients, with MTP")],
)  # fmt: skip
def test_overlapping_communication_changes_neither_steps_nor_the_weights_that_leave(model, world, changes, overlap, request):
    folder = request.getfixturevalue(model)
    plain = run_ranks(world, two_rollouts, folder, changes, False, world)
    other = run_ranks(world, two_rollouts, folder, changes | OVERLAPS[overlap], False, world)
    assert plain[0][0] == other[0][0] and len(set(plain[0][0])) == 2, "the rollouts differ in their number of micro-batches"
    for (_, steps, weights), (_, overlapped, moved) in zip(plain, other, strict=True):
        for ours, theirs in zip(steps, overlapped, strict=True):
            assert theirs[0]["train/grad_norm"] == pytest.approx(ours[0]["train/grad_norm"], rel=1e-5)
        stale = [name for name, weight in weights.items() if not torch.allclose(weight, moved[name], rtol=1e-4, atol=1e-6)]
        assert not stale, stale


def offloaded(rank: int, folder, changes: dict) -> tuple:
    config = config_for(folder, lr=1e-3, params_dtype="bf16", **changes)
    trainer = start(config)
    batch = rollout()
    report = trainer.train(batch, plans(batch, config, 1))
    return report.per_step, {name: weight.clone() for name, weight in trainer.named_weights()}


FLAGSHIP = dict(optimizer_cpu_offload=True, overlap_cpu_optimizer_d2h_h2d=True, use_precision_aware_optimizer=True)


def test_the_flagships_optimizer_flags_take_the_plain_step_where_nothing_can_be_offloaded(qwen3):
    steps, weights = run_ranks(1, offloaded, qwen3, {})[0]
    same, equal = run_ranks(1, offloaded, qwen3, FLAGSHIP)[0]
    assert same == steps
    assert all(torch.equal(weights[name], equal[name]) for name in weights)


@pytest.mark.parametrize(
    ("flags", "dtype", "expected"),
    [
        (FLAGSHIP, torch.bfloat16, (True, True)),
        # Without the precision-aware optimizer the host would keep copies of weights from before the checkpoint was loaded.
        (dict(optimizer_cpu_offload=True), torch.bfloat16, (True, True)),
        (dict(use_precision_aware_optimizer=True), torch.bfloat16, (False, False)),
        ({}, torch.float32, (False, False)),
    ],
)
def test_optimizer_flags_on_gpus_without_transformer_engine(qwen3, flags, dtype, expected):
    modes = optimizer_modes(config_for(qwen3, **flags), dtype, on_host=False)
    assert (modes.offload, modes.precision_aware) == expected
    assert bool(modes.notes) == (expected[1] != flags.get("use_precision_aware_optimizer", False))


def test_what_cannot_be_kept_is_refused_before_weights_are_touched(qwen3):
    with pytest.raises(ValueError, match="float32 copies of bf16"):
        optimizer_modes(config_for(qwen3, **FLAGSHIP), torch.float32, on_host=False)
    narrow = dict(use_precision_aware_optimizer=True, exp_avg_dtype="bf16")
    with pytest.raises(ValueError, match="--exp-avg-dtype bf16: only TransformerEngine"):
        optimizer_modes(config_for(qwen3, **narrow), torch.bfloat16, on_host=False)


def resumed_with_classes(rank: int, folder, root) -> tuple[int, list[type]]:
    config = config_for(folder, save=str(root), load=str(root))
    trainer = start(config)
    groups = [group for part in trainer.optimizer.chained_optimizers for group in part.optimizer.param_groups]
    for group in groups:
        group["cpu_optimizer_cls"] = torch.optim.AdamW  # as megatron-core's offloading optimizer does on a GPU
    batch = rollout()
    trainer.train(batch, plans(batch, config, 1))
    trainer.save(0, data_state={})
    return start(config, load=False).load().start_rollout_id, [group["cpu_optimizer_cls"] for group in groups]


def test_a_checkpoint_of_the_offloading_optimizer_can_be_continued(qwen3, tmp_path):
    start_rollout_id, classes = run_ranks(1, resumed_with_classes, qwen3, tmp_path / "run")[0]
    assert start_rollout_id == 1 and set(classes) == {torch.optim.AdamW}


def offload_from_the_host() -> None:
    """megatron-core's offloading optimizer, told that every parameter is on a GPU; only in this process."""
    from megatron.core.optimizer.cpu_offloading import hybrid_optimizer

    offloading = hybrid_optimizer.HybridDeviceOptimizer
    source = textwrap.dedent(inspect.getsource(offloading._get_sub_optimizer_param_groups)).replace("@staticmethod\n", "")
    for word, here in (
        (".cpu().pin_memory()", ""),
        (" and param.is_cuda", ""),
        ("if param.is_cuda])", "])"),
        ("if param.is_cuda:", "if not cpu_copy:"),
    ):
        assert word in source, word
        source = source.replace(word, here)
    made: dict = {}
    exec(source, vars(hybrid_optimizer), made)
    offloading._get_sub_optimizer_param_groups = made["_get_sub_optimizer_param_groups"]
    published = offloading.__init__
    offloading.__init__ = lambda self, *args, **kwargs: published(self, *args, **{**kwargs, "pin_cpu_grads": False})
    slime.training.optimizer.optimizer_modes = lambda config, dtype, on_host: optimizer_modes(config, dtype, on_host=False)


def two_rollouts_and_a_resume(rank: int, folder, root, changes: dict) -> tuple:
    if changes:
        offload_from_the_host()
    config = config_for(folder, lr=1e-3, params_dtype="bf16", save=str(root), load=str(root), **changes)
    trainer, ends = start(config), []
    for rollout_id in range(2):
        batch = rollout(rollout_id)
        report = trainer.train(batch, plans(batch, config, 1))
        if rollout_id == 0:
            trainer.save(0, data_state={})
    ends.append((report.per_step, {name: weight.clone() for name, weight in trainer.named_weights()}))
    resumed = start(config, load=False)
    assert resumed.load().start_rollout_id == 1
    report = resumed.train(batch, plans(batch, config, 1))
    ends.append((report.per_step, {name: weight.clone() for name, weight in resumed.named_weights()}))
    before = torch.get_num_threads()
    with step_threads(trainer.optimizer, config) as threads:  # all cores are this one rank's, where the host takes the step
        assert threads == torch.get_num_threads() == (max(before, usable_cores()) if changes else before)
    assert torch.get_num_threads() == before and 1 <= usable_cores() <= len(os.sched_getaffinity(0))
    return ends


@pytest.mark.parametrize(
    "changes", [FLAGSHIP, dict(optimizer_cpu_offload=True, optimizer_offload_fraction=0.5)], ids=["all", "half"]
)
def test_an_offloading_optimizer_takes_the_plain_steps_and_continues_from_its_checkpoint(qwen3, tmp_path, changes):
    (steps, weights), _ = run_ranks(1, two_rollouts_and_a_resume, qwen3, tmp_path / "plain", {})[0]
    for same, equal in run_ranks(1, two_rollouts_and_a_resume, qwen3, tmp_path / "offloaded", changes)[0]:
        assert same == steps
        assert all(torch.equal(weights[name], equal[name]) for name in weights)
