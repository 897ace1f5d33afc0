"""What happens to optimizer and reference between rollouts, and what the trainer writes down of one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ranks import run_ranks
from training.tiny import config_for, plans, rollout, start


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in trainer.named_weights()}


def second_rollout(rank: int, folder, *, fresh_optimizer: bool, **changes) -> dict[str, torch.Tensor]:
    """Weights after two rollouts; if asked, the second with a trainer that is built anew around the weights of the first."""
    config = config_for(folder, **changes)
    trainer = start(config)
    for rollout_id in range(2):
        if rollout_id == 1 and fresh_optimizer:
            trained, trainer = weights_of(trainer), start(config)
            for name, weight in trainer.named_weights():
                weight.data.copy_(trained[name])
            trainer.optimizer.reload_model_params()
        batch = rollout(rollout_id)
        trainer.train(batch, plans(batch, config, 1))
    return weights_of(trainer)


def test_reset_optimizer_states_is_a_new_optimizer_around_the_same_weights(qwen3):
    def both(rank: int):
        plain = second_rollout(rank, qwen3, fresh_optimizer=False)
        reset = second_rollout(rank, qwen3, fresh_optimizer=False, reset_optimizer_states=True)
        fresh = second_rollout(rank, qwen3, fresh_optimizer=True)
        return plain, reset, fresh

    plain, reset, fresh = run_ranks(1, both)[0]
    assert [name for name, weight in reset.items() if not torch.equal(weight, fresh[name])] == []
    assert any(not torch.equal(weight, plain[name]) for name, weight in reset.items()), "history matters otherwise"


def test_the_reference_follows_the_policy_at_every_interval(qwen3):
    def kl_of_first_steps(rank: int, interval: int | None) -> list[float]:
        config = config_for(qwen3, use_kl_loss=True, kl_loss_coef=0.1, ref_load=str(qwen3), ref_update_interval=interval)
        trainer = start(config)
        trainer.snapshots.take("ref")
        found = []
        for rollout_id in range(5):
            batch = rollout(rollout_id)
            found.append(trainer.train(batch, plans(batch, config, 1)).per_step[0]["train/kl_loss"])
        return found

    def both(rank: int):
        return kl_of_first_steps(rank, None), kl_of_first_steps(rank, 2)

    fixed, followed = run_ranks(1, both)[0]
    assert [abs(kl) < 1e-7 for kl in fixed] == [True, False, False, False, False]
    # Two rollouts are trained before the policy becomes the reference, so every second first step is at no distance from it.
    assert [abs(kl) < 1e-7 for kl in followed] == [True, False, True, False, True]


def test_a_continued_run_takes_the_reference_from_its_weights_only_at_an_interval(qwen3):
    def restored(rank: int) -> tuple[bool, bool, str]:
        trainer = start(config_for(qwen3, use_kl_loss=True, ref_load=str(qwen3), ref_update_interval=3))
        trainer._restore_reference(2)
        early = "ref" in trainer.snapshots
        with pytest.raises(ValueError) as refused:
            trainer._restore_reference(4)
        trainer._restore_reference(6)
        return early, "ref" in trainer.snapshots, str(refused.value)

    early, due, refused = run_ranks(1, restored)[0]
    assert not early and due
    assert "the reference of rollout 3 is in no checkpoint of rollout 4" in refused and "--ckpt-step" in refused


@pytest.mark.parametrize("name", ["{rollout_id}.pt", "{rollout_id}-{rank}.pt"])
def test_what_the_steps_train_on_is_written_once_per_sample(qwen3, tmp_path, name):
    def train(rank: int) -> None:
        config = config_for(qwen3, save_debug_train_data=str(tmp_path / name))
        batch = rollout(7)
        start(config).train(batch, plans(batch, config, 2))

    run_ranks(2, train)
    files = [torch.load(path, weights_only=False) for path in sorted(tmp_path.glob("*.pt"))]
    assert len(files) == (2 if "rank" in name else 1) and {file["rollout_id"] for file in files} == {7}
    batch, rows = rollout(7), {}
    for file in files:
        data = file["rollout_data"]
        for row, sample_id in enumerate(data["sample_indices"]):
            rows[sample_id] = {key: values[row] for key, values in data.items() if values is not None}
    assert sorted(rows) == sorted(int(i) for i in batch.sample_ids)
    for position, sample_id in enumerate(batch.sample_ids):
        row = rows[int(sample_id)]
        assert row["tokens"].tolist() == batch.tokens[position].tolist()
        assert row["rollout_log_probs"].tolist() == batch.rollout_log_probs[position].tolist()
        assert torch.allclose(row["advantages"], torch.full((len(row["advantages"]),), float(batch.rewards[position])))


def test_old_log_probs_are_of_the_weights_that_wrote_the_rollout(qwen3):
    """One step ahead: rollout 1 was written by version 1, and the trainer has trained rollout 0 and sent version 2 since."""

    def run(rank: int) -> tuple[float, dict, dict]:
        config = config_for(qwen3, keep_old_actor=True)
        trainer = start(config)
        first, second = (replace(rollout(n), weight_versions=(("1",),) * 8) for n in range(2))
        trainer.note_sent(1)
        before = trainer.log_probs(second, plans(second, config, 1))
        expected = sum(float(before[row][mask > 0].mean()) for row, mask in enumerate(second.loss_masks) if mask.any()) / 8
        trainer.train(first, plans(first, config, 1))
        trainer.note_sent(2)
        trainer.note_sent(3)  # an engine was started anew meanwhile: the same weights
        own = weights_of(trainer)
        trained = replace(second, weight_versions=(("1",),) * 4 + (("3",),) * 4)
        halves = trainer.old_actor.writers(trained.weight_versions)
        report = trainer.train(second, plans(second, config, 1))
        assert any(not torch.equal(weight, own[name]) for name, weight in trainer.named_weights())
        with pytest.raises(ValueError, match="row 0 was written by weights 7, and the trainer has 1, 2, 3; take the engines'"):
            trainer.train(replace(second, weight_versions=(("7",),) * 8), plans(second, config, 1))
        trainer.note_sent(4)
        with pytest.raises(ValueError, match="row 0 was written by weights 1, and the trainer has 2, 3, 4"):
            trainer.old_actor.writers(second.weight_versions)
        return expected, halves, report.metrics | report.per_step[0]

    expected, halves, told = run_ranks(1, run)[0]
    assert told["rollout/log_probs"] == pytest.approx(expected, abs=1e-6)
    assert sorted(halves.values()) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert abs(told["train/ppo_kl"]) > 1e-5, "the steps begin at other weights than those that wrote"
