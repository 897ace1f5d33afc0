"""PPO with a critic against a plain formula on transformers' hidden states, over layouts, over a resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import RankFailed, run_ranks
from test_objectives import hf_log_probs, mean, plain_mean, second  # noqa: F401
from tiny import config_for, plans, rollout, start_ppo

from slime.config.passes import passes_of
from slime.model.local import VALUE_HEAD, local_tensors

pytestmark = pytest.mark.slow

PPO = dict(advantage_estimator="ppo", gamma=0.95, lambd=0.9, value_clip=0.2, clip_grad=0.0)


def head_of(width: int) -> torch.Tensor:
    return 0.3 * torch.randn(width, generator=torch.Generator().manual_seed(9))


def started(folder: Path, changes: dict, *, head: bool = True):
    trainer = start_ppo(config_for(folder, **PPO | changes))
    trainer.load()
    for local in local_tensors(trainer.critic.trainer.model, trainer.ranks):
        if head and local.name == VALUE_HEAD:
            local.tensor.copy_(head_of(local.tensor.shape[1])[None])
    trainer.critic.trainer.optimizer.reload_model_params()
    return trainer


def step_of(rank: int, folder: Path, changes: dict, batch, world: int = 1) -> tuple:
    trainer = started(folder, changes)
    report = trainer.train(batch, plans(batch, trainer.config, world))
    head = [local.parameter for local in local_tensors(trainer.critic.trainer.model, trainer.ranks) if local.name == VALUE_HEAD]
    return report, head[0].main_grad.clone() if head else None


def hf_values(folder: Path, batch):
    """transformers: (model, head, value before each response token)."""
    import transformers

    model = transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").model
    head = head_of(model.config.hidden_size).requires_grad_()
    values = []
    for tokens, length in zip(batch.tokens, batch.response_lengths, strict=True):
        values.append((model(torch.from_numpy(tokens)[None]).last_hidden_state[0] @ head)[-int(length) - 1 : -1])
    return model, head, values


def gae_by_definition(rewards, values, mask, gamma: float = 0.95, lambd: float = 0.9) -> np.ndarray:
    """Sum over later steps k of (gamma lambda)^k delta, on trained tokens; a second formula, without a recursion."""
    steps = np.flatnonzero(mask)
    v, r = values[steps], rewards[steps]
    delta = r + gamma * np.append(v[1:], 0.0) - v
    found = np.zeros(len(mask))
    for place, step in enumerate(steps):
        found[step] = sum((gamma * lambd) ** k * delta[place + k] for k in range(len(steps) - place))
    return found


def test_one_step_of_actor_and_critic_equals_the_formula(qwen3, second):  # noqa: F811
    batch = rollout(seed=51)
    changes = dict(kl_coef=0.2, kl_loss_type="k2", load=str(qwen3), ref_load=str(second))
    report, head_gradient = run_ranks(1, step_of, qwen3, changes, batch)[0]
    body, head, values = hf_values(qwen3, batch)
    model, log_probs, _ = hf_log_probs(qwen3, batch)
    with torch.no_grad():
        reference = hf_log_probs(second, batch)[1]
    advantages, returns = [], []
    for row, mask in enumerate(batch.loss_masks):
        rewards = -0.2 * ((log_probs[row].detach() - reference[row]) ** 2 / 2).numpy() * mask
        if mask.any():
            rewards[np.flatnonzero(mask)[-1]] += batch.rewards[row]
        known = values[row].detach().numpy()
        advantages.append(torch.tensor(gae_by_definition(rewards, known, mask), dtype=torch.float32))
        returns.append(advantages[-1] + values[row].detach() * torch.from_numpy(mask))
    value_loss = mean(batch, [(v - r) ** 2 for v, r in zip(values, returns, strict=True)])
    pg_loss = mean(batch, [-a * (lp - lp.detach()).exp() for a, lp in zip(advantages, log_probs, strict=True)])
    step = report.per_step[0]
    assert step["train/critic-value_loss"] == pytest.approx(value_loss.item(), rel=2e-5)
    assert step["train/critic-value_clipfrac"] == 0, "the values have not moved yet"
    assert step["train/pg_loss"] == pytest.approx(pg_loss.item(), rel=2e-5, abs=1e-6)
    value_loss.backward()
    pg_loss.backward()
    norms = [sum(p.grad.double().square().sum() for p in [*body.parameters(), head]) ** 0.5]
    norms.append(sum(p.grad.double().square().sum() for p in model.parameters()) ** 0.5)
    assert [step["train/critic-grad_norm"], step["train/grad_norm"]] == pytest.approx([float(n) for n in norms], rel=3e-5)
    torch.testing.assert_close(head_gradient[0], head.grad, rtol=1e-4, atol=1e-6)
    assert report.metrics["rollout/values"] == pytest.approx(plain_mean(batch, [v.detach() for v in values]), rel=1e-4)
    assert report.metrics["rollout/returns"] == pytest.approx(plain_mean(batch, returns), rel=1e-4)


LAYOUTS = {
    "data": (2, {}),
    "tensor": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    "pipeline": (2, dict(pipeline_model_parallel_size=2)),
    "context": (2, dict(context_parallel_size=2)),
    "small micro-batches": (1, dict(max_tokens_per_gpu=32)),
}


def test_actor_and_critic_learn_the_same_in_every_layout(qwen3):
    batch = rollout(seed=52)
    one = run_ranks(1, step_of, qwen3, {}, batch)[0][0].per_step[0]
    for name, (world, layout) in LAYOUTS.items():
        found = run_ranks(world, step_of, qwen3, layout, batch, world)
        for report, _ in found:
            for key in ("train/critic-value_loss", "train/critic-grad_norm", "train/grad_norm", "train/pg_loss"):
                assert report.per_step[0][key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), (name, key)


def test_a_sparse_model_has_a_critic_too(glm):
    changes = dict(tensor_model_parallel_size=2, sequence_parallel=True)
    batch = rollout(seed=53)
    one = run_ranks(1, step_of, glm, {}, batch)[0][0].per_step[0]
    two = run_ranks(2, step_of, glm, changes, batch, 2)[0][0].per_step[0]
    assert one["train/critic-grad_norm"] > 0
    assert two["train/critic-value_loss"] == pytest.approx(one["train/critic-value_loss"], rel=1e-3)


def test_the_second_step_clips_values_against_those_from_before_the_first(qwen3):
    batch = rollout(seed=54)
    changes = dict(global_batch_size=4, value_clip=1e-3)
    first, again = run_ranks(1, step_of, qwen3, changes, batch)[0][0].per_step
    assert first["train/critic-value_clipfrac"] == 0 < again["train/critic-value_clipfrac"]
    assert (first["train/step"], again["train/step"]) == (1, 2)


def test_the_critic_learns_alone_first_and_at_a_rate_of_its_own(qwen3):
    def run(rank: int):
        trainer = started(qwen3, dict(num_critic_only_steps=1, critic_lr=3e-3, lr=1e-2), head=False)
        weight = next(iter(trainer.model[0].parameters()))
        before, told = weight.detach().clone(), []
        for rollout_id in range(2):
            batch = rollout(rollout_id, seed=55)
            told.append(trainer.train(batch, plans(batch, trainer.config, 1)).per_step[0])
            moved = bool((weight != before).any())
            assert moved == (rollout_id == 1)
        return told

    alone, both = run_ranks(1, run)[0]
    assert alone.keys() & {"train/pg_loss", "train/grad_norm"} == set() and alone["train/step"] == 1 and both["train/step"] == 2
    assert (both["train/critic-lr-pg_0"], both["train/lr-pg_0"]) == pytest.approx((3e-3, 1e-2))
    assert alone["train/critic-value_loss"] == pytest.approx(
        mean(rollout(0, seed=55), zero_value_losses(rollout(0, seed=55))).item(), rel=1e-5
    ), "a new critic expects nothing, so the loss is the mean squared return"


def zero_value_losses(batch) -> list[torch.Tensor]:
    """Returns of values of 0: the reward, discounted by gamma lambda for every trained token that follows."""
    losses = []
    for reward, mask in zip(batch.rewards, batch.loss_masks, strict=True):
        later = mask[::-1].cumsum()[::-1] - mask
        losses.append(torch.tensor((float(reward) * (0.95 * 0.9) ** later) ** 2, dtype=torch.float32))
    return losses


def resumed(rank: int, folder: Path, save: Path, rollouts, changes: dict | None = None) -> list[dict]:
    """Train, saving after each; from where --load is."""
    load = dict(load=str(save), critic_load=str(save / "critic")) if rollouts.start else {}
    paths = dict(save=str(save), critic_save=str(save / "critic"), **load, **(changes or {}))
    trainer = started(folder, paths, head=False)
    told = []
    for rollout_id in rollouts:
        batch = rollout(rollout_id, seed=56)
        told.append(trainer.train(batch, plans(batch, trainer.config, 1)).per_step[0])
        trainer.save(rollout_id, data_state={})
    return told


def test_a_stopped_run_goes_on_with_the_critic_that_it_had(qwen3, tmp_path):
    whole = run_ranks(1, resumed, qwen3, tmp_path / "whole", range(4))[0]
    first = run_ranks(1, resumed, qwen3, tmp_path / "cut", range(2))[0]
    rest = run_ranks(1, resumed, qwen3, tmp_path / "cut", range(2, 4))[0]
    assert first + rest == whole, "to the bit"
    # The actor's newest checkpoint is the one before the critic's, as after a save that broke between the two.
    (tmp_path / "cut" / "latest_checkpointed_iteration.txt").write_text("1")
    assert run_ranks(1, resumed, qwen3, tmp_path / "cut", range(2, 4))[0] == rest
    for folder in (tmp_path / "cut" / "critic").glob("iter_*"):
        folder.rename(folder.with_name(folder.name.replace("iter", "was")))
    with pytest.raises(RankFailed, match="continues after rollout 4, but no critic of that rollout is in --critic-load"):
        run_ranks(1, resumed, qwen3, tmp_path / "cut", range(4, 5))


def test_a_critic_is_no_policy(qwen3, tmp_path):
    run_ranks(1, resumed, qwen3, tmp_path / "run", range(1))
    critic = tmp_path / "run" / "critic"
    with pytest.raises(RankFailed, match="holds another model:\n.*head: checkpoint 'value', .* None"):
        run_ranks(1, step_of, qwen3, dict(load=str(critic)), rollout())
    step = run_ranks(1, step_of, qwen3, dict(critic_load=str(critic)), rollout(seed=56))[0][0].per_step[0]
    assert np.isfinite(step["train/critic-value_loss"]), "another run may begin with its weights"
    step = run_ranks(1, step_of, qwen3, dict(critic_load=str(qwen3)), rollout(seed=56))[0][0].per_step[0]
    assert np.isfinite(step["train/critic-value_loss"]), "and with HF files"


def test_ppo_needs_the_critics_pass(qwen3):
    assert passes_of(config_for(qwen3, **PPO), 1).values and not passes_of(config_for(qwen3), 1).values
