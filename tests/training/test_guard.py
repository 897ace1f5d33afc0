"""A bad gradient is never skipped silently."""

from __future__ import annotations

import pytest
import torch
from ranks import RankFailed, run_ranks
from tiny import config_for, plans, rollout, start

from slime.model.local import local_tensors
from slime.training.guard import NonFiniteGradient

pytestmark = pytest.mark.slow


def poisoned(rank: int, folder, changes: dict, world: int, bad_rollouts: tuple[int, ...], num_rollouts: int):
    """Train; in bad rollouts the backward pass of layer 2's first matrix gives NaN on the last rank."""
    config = config_for(folder, **changes)
    trainer = start(config)
    poison = [False]
    chunk = trainer.model[0]
    if rank == world - 1:
        layer = chunk.decoder.layers[-1]
        layer.mlp.linear_fc1.weight.register_hook(lambda gradient: gradient * float("nan") if poison[0] else gradient)
    weights, reports = [], []
    for rollout_id in range(num_rollouts):
        poison[0] = rollout_id in bad_rollouts
        batch = rollout(rollout_id)
        reports.append(trainer.train(batch, plans(batch, config, world)).per_step[0])
        weights.append(torch.cat([weight.flatten().clone() for _, weight in trainer.named_weights()]))
    return reports, weights


@pytest.mark.parametrize("layout", [dict(), dict(pipeline_model_parallel_size=2)], ids=["DP2", "PP2"])
def test_a_nan_gradient_stops_the_run_naming_step_rank_parameter_and_samples(qwen3, layout):
    with pytest.raises(RankFailed) as told:
        run_ranks(2, poisoned, qwen3, layout, 2, (1,), 3)
    message = str(told.value)
    assert "NonFiniteGradient: rollout 2 step 1" in message
    assert "rank 1: first bad gradient: decoder.layers." in message and "mlp.linear_fc1.weight" in message
    assert "rank 0: first bad gradient" not in message, "only the rank whose own gradient was bad is accused"
    assert "samples [100, 101, 102" in message


def test_allowed_skips_leave_the_weights_alone_are_counted_and_end(qwen3):
    changes = dict(check_for_nan_in_loss_and_grad=False)
    reports, weights = run_ranks(2, poisoned, qwen3, changes, 2, (1, 2), 4)[0]
    assert (
        torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2]) and not torch.equal(weights[2], weights[3])
    )
    assert [report["train/skipped_steps"] for report in reports] == [0, 1, 2, 2]
    with pytest.raises(RankFailed, match="rollout 4 step 1.*3 were skipped before"):
        run_ranks(1, poisoned, qwen3, changes, 1, (0, 1, 2, 3), 5)


def test_a_nan_loss_names_its_micro_batch_and_not_the_whole_step(qwen3):
    batch = rollout(4)
    batch.rewards[5] = float("nan")

    def run(rank: int):
        config = config_for(qwen3, use_dynamic_batch_size=False, micro_batch_size=1)
        trainer = start(config)
        trainer.train(batch, plans(batch, config, 1))

    with pytest.raises(RankFailed, match=r"rollout 5 step 1.*the loss of samples \[405\] is not finite"):
        run_ranks(1, run)


AXES = {
    "DP": ({}, "decoder.layers.7.self_attention.linear_proj.weight"),
    "TP": (
        dict(tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=2),
        "decoder.layers.0.mlp.linear_fc1.weight",
    ),
    "PP": (
        dict(pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=6),
        "decoder.layers.7.self_attention.linear_proj.weight",
    ),
    "CP": (dict(context_parallel_size=2, allgather_cp=True), "decoder.layers.3.mlp.router.weight"),
    "EP": (dict(expert_model_parallel_size=2), "decoder.layers.4.mlp.experts.linear_fc2.weight5"),
}


def plant(trainer, name: str, active: list[bool]) -> None:
    """While active[0], the gradient of this parameter of this rank becomes NaN."""
    for local in local_tensors(trainer.model, trainer.ranks):
        if local.name != name:
            continue

        def poison(gradient, row=int(name[-1]) % 4 if local.is_expert else slice(None)):
            gradient = gradient.clone()
            gradient[row] = float("nan")
            return gradient

        local.parameter.register_hook(lambda gradient: poison(gradient) if active[0] else gradient)
        return
    raise AssertionError(f"{name} is not on this rank")


def bad_rank_of_every_axis(rank: int, folder) -> dict:
    """Per axis: (skipped steps after each rollout, did weights move in it, the final message, the message of a NaN loss)."""
    results = {}
    for axis, (changes, name) in AXES.items():
        changes = dict(expert_tensor_parallel_size=1, use_dynamic_batch_size=False, micro_batch_size=1) | changes
        config = config_for(folder, check_for_nan_in_loss_and_grad=False, max_skipped_steps=1, **changes)
        trainer, active, skipped, moved = start(config), [False], [], []
        if rank == 1:
            plant(trainer, name, active)
        for rollout_id, active[0] in enumerate((True, False, True)):
            before = [weight.clone() for _, weight in trainer.named_weights()]
            batch = rollout(rollout_id)
            try:
                report = trainer.train(batch, plans(batch, config, 2))
            except NonFiniteGradient as error:
                message = str(error)
                break
            skipped.append(report.per_step[0]["train/skipped_steps"])
            moved.append(any(not torch.equal(x, y) for x, (_, y) in zip(before, trainer.named_weights(), strict=True)))
        trainer, batch = start(config_for(folder, **changes)), rollout(4)
        batch.rewards[5] = float("nan")
        with pytest.raises(NonFiniteGradient) as told:
            trainer.train(batch, plans(batch, config, 2))
        results[axis] = (skipped, moved, message, str(told.value))
    return results


def test_a_nan_on_one_rank_of_any_axis_is_named_by_all_ranks(glm):
    first, second = run_ranks(2, bad_rank_of_every_axis, glm, timeout=400)
    assert first == second, "every rank tells the same"
    for axis, (skipped, moved, message, nan_loss) in first.items():
        name = AXES[axis][1]
        assert skipped == [1, 1] and moved == [False, True], axis
        assert message.startswith("rollout 3 step 1: gradient norm nan; "), (axis, message)
        assert f"rank 1: first bad gradient: {name};" in message and "rank 0" not in message, (axis, message)
        assert "samples [200, 201, 202" in message and "1 were skipped before" in message, (axis, message)
        assert "rollout 5 step 1" in nan_loss and "the loss of samples [405] is not finite" in nan_loss, (axis, nan_loss)
