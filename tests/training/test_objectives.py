"""Passes, advantages and losses of whole rollouts against plain formulas on transformers' log-probs."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import RankFailed, run_ranks
from tiny import config_for, gradients, plans, rollout, start

from slime.batch.pack import pack
from slime.config.passes import passes_of
from slime.training.columns import Columns, fill_advantages
from slime.training.importance_functions import icepop_function
from slime.training.loss import Objective

pytestmark = pytest.mark.slow


def hf_log_probs(folder, batch, temperature: float = 0.8) -> tuple[object, list[torch.Tensor], list[torch.Tensor]]:
    """transformers: (model, log-probs, entropies) of each sample's response."""
    import transformers

    model = transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    log_probs, entropies = [], []
    for row in range(len(batch)):
        tokens = torch.from_numpy(batch.tokens[row])
        log_p = torch.log_softmax(model(tokens[None]).logits[0, :-1] / temperature, -1)[-int(batch.response_lengths[row]) :]
        log_probs.append(log_p.gather(1, tokens[-int(batch.response_lengths[row]) :, None])[:, 0])
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    return model, log_probs, entropies


def mean(batch, values: list[torch.Tensor]) -> torch.Tensor:
    """Mean over samples of the mean over trained tokens."""
    masks = [torch.from_numpy(mask) for mask in batch.loss_masks]
    return sum((v * m).sum() / m.sum().clamp(min=1) for v, m in zip(values, masks, strict=True)) / len(batch)


def step_of(rank: int, folder, changes: dict, batch, world: int = 1) -> tuple:
    trainer = start(config_for(folder, clip_grad=0.0, **changes), load=False)
    trainer.load()
    report = trainer.train(batch, plans(batch, trainer.config, world))
    return report, (gradients(trainer) if world == 1 else None)


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """Another model of the same shape, as reference."""
    import tiny

    return tiny.qwen3(tmp_path_factory.mktemp("second"), seed=1)


def check_against(folder, batch, report, grads, loss) -> None:
    """loss: scalar of transformers' graph; compares value, gradient norm and one gradient."""
    model, value = loss
    value.backward()
    assert report.per_step[0]["train/loss"] == pytest.approx(value.item(), rel=2e-5, abs=1e-6)
    norm = float(sum(p.grad.double().square().sum() for p in model.parameters()) ** 0.5)
    assert report.per_step[0]["train/grad_norm"] == pytest.approx(norm, rel=2e-5)
    theirs = model.model.embed_tokens.weight.grad
    ours = grads["embedding.word_embeddings.weight"][: len(theirs)]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))


def test_kl_loss_entropy_bonus_and_cispo(qwen3, second):
    batch = rollout(seed=11)
    changes = dict(
        advantage_estimator="cispo",
        use_kl_loss=True,
        kl_loss_coef=0.3,
        kl_loss_type="k3",
        entropy_coef=0.05,
        load=str(qwen3),
        ref_load=str(second),
    )
    report, grads = run_ranks(1, step_of, qwen3, changes, batch)[0]
    model, log_probs, entropies = hf_log_probs(qwen3, batch)
    with torch.no_grad():
        reference = hf_log_probs(second, batch)[1]
    gap = [a - b for a, b in zip(log_probs, reference, strict=True)]
    kl = mean(batch, [(-d).exp() - 1 + d for d in gap])
    pg = mean(batch, [-float(r) * lp for r, lp in zip(batch.rewards, log_probs, strict=True)])  # CISPO: ratio 1 as weight
    entropy = mean(batch, entropies)
    values = report.per_step[0]
    assert values["train/kl_loss"] == pytest.approx(kl.item(), rel=1e-4)
    assert values["train/entropy_loss"] == pytest.approx(entropy.item(), rel=1e-5)
    check_against(qwen3, batch, report, grads, (model, pg + 0.3 * kl - 0.05 * entropy))
    # The reference's weights are gone from the model again: the step started from the actor's own.
    assert values["train/ppo_kl"] == 0.0


def test_reinforce_plus_plus_with_kl_in_the_reward_and_whitening(qwen3, second):
    batch = rollout(seed=12)
    changes = dict(
        advantage_estimator="reinforce_plus_plus", kl_coef=0.2, kl_loss_type="k2", gamma=0.9, normalize_advantages=True,
        load=str(qwen3), ref_load=str(second),
    )  # fmt: skip
    report, grads = run_ranks(1, step_of, qwen3, changes, batch)[0]
    model, log_probs, _ = hf_log_probs(qwen3, batch)
    with torch.no_grad():
        reference = hf_log_probs(second, batch)[1]
    advantages = []
    for row, (mine, other) in enumerate(zip(log_probs, reference, strict=True)):
        mask = batch.loss_masks[row]
        token_rewards = -0.2 * ((mine.detach() - other) ** 2 / 2).numpy() * mask
        if not mask.any():
            pytest.fail("the made-up rollout has a sample without a trained token; choose another seed")
        token_rewards[np.flatnonzero(mask)[-1]] += batch.rewards[row]
        advantages.append([sum(token_rewards[k] * 0.9 ** (k - t) for k in range(t, len(mask))) for t in range(len(mask))])
    kept = np.concatenate([np.array(a)[m > 0] for a, m in zip(advantages, batch.loss_masks, strict=True)])
    white = [torch.tensor((np.array(a) - kept.mean()) / kept.std(ddof=1), dtype=torch.float32) for a in advantages]
    loss = mean(batch, [-a * (lp - lp.detach()).exp() for a, lp in zip(white, log_probs, strict=True)])
    check_against(qwen3, batch, report, grads, (model, loss))
    two = run_ranks(2, step_of, qwen3, changes, batch, 2)[1][0].per_step[0]
    assert two["train/grad_norm"] == pytest.approx(report.per_step[0]["train/grad_norm"], rel=1e-5), "whitening spans ranks"


def test_gspo_gives_each_token_its_sequences_ratio(qwen3):
    batch = rollout(seed=13)
    report, grads = run_ranks(1, step_of, qwen3, dict(advantage_estimator="gspo", eps_clip=1e-4, eps_clip_high=2e-4), batch)[0]
    model, log_probs, _ = hf_log_probs(qwen3, batch)
    # At ratio 1 the gradient of a token's loss is that of its sample's mean log-prob: the sample's gradient is unchanged,
    # times 1.
    means = []
    for lp, mask, reward in zip(log_probs, batch.loss_masks, batch.rewards, strict=True):
        m = torch.from_numpy(mask)
        sequence = ((lp - lp.detach()) * m).sum() / m.sum().clamp(min=1)
        means.append(-float(reward) * sequence.exp() * float(mask.any()))
    check_against(qwen3, batch, report, grads, (model, sum(means) / len(batch)))


def test_the_second_step_of_a_rollout_is_measured_against_log_probs_from_before_the_first(qwen3):
    batch = rollout(seed=14)
    changes = dict(global_batch_size=4, lr=3e-3)
    report, _ = run_ranks(1, step_of, qwen3, changes, batch)[0]
    first, again = report.per_step
    assert first["train/ppo_kl"] == 0.0, "old log-probs come from the same micro-batches, so the first ratio is exactly 1"
    assert abs(again["train/ppo_kl"]) > 1e-4 and again["train/pg_clipfrac"] > 0
    _, log_probs, entropies = hf_log_probs(qwen3, batch)
    assert report.metrics["rollout/log_probs"] == pytest.approx(plain_mean(batch, log_probs), rel=1e-5)
    assert report.metrics["rollout/entropy"] == pytest.approx(plain_mean(batch, entropies), rel=1e-5)
    gap = [lp.detach() - torch.from_numpy(r) for lp, r in zip(log_probs, batch.rollout_log_probs, strict=True)]
    means = [
        float((g.abs() * torch.from_numpy(m)).sum() / m.sum()) if m.any() else 0
        for g, m in zip(gap, batch.loss_masks, strict=True)
    ]
    assert first["train/train_rollout_logprob_abs_diff"] == pytest.approx(np.mean(means[:4]), rel=1e-5)
    assert again["train/train_rollout_logprob_abs_diff"] == pytest.approx(np.mean(means[4:]), rel=1e-5)


def plain_mean(batch, values) -> float:
    return float(
        np.mean(
            [
                v[torch.from_numpy(m) > 0].mean().item() if m.any() else 0.0
                for v, m in zip(values, batch.loss_masks, strict=True)
            ]
        )
    )


def test_engine_log_probs_as_the_old_ones(qwen3):
    batch = rollout(seed=15)
    report, grads = run_ranks(1, step_of, qwen3, dict(use_rollout_logprobs=True), batch)[0]
    model, log_probs, _ = hf_log_probs(qwen3, batch)
    ratios = [(lp - torch.from_numpy(old)).exp() for lp, old in zip(log_probs, batch.rollout_log_probs, strict=True)]
    losses = [torch.maximum(-r * float(a), -r.clamp(0.8, 1.28) * float(a)) for r, a in zip(ratios, batch.rewards, strict=True)]
    check_against(qwen3, batch, report, grads, (model, mean(batch, losses)))


def test_sft_is_the_mean_negative_log_likelihood_at_temperature_one(qwen3):
    batch = rollout(seed=16, log_probs=False)
    changes = dict(loss_type="sft_loss", compute_advantages_and_returns=False, calculate_per_token_loss=True)
    report, grads = run_ranks(1, step_of, qwen3, changes, batch)[0]
    model, log_probs, _ = hf_log_probs(qwen3, batch, temperature=1.0)
    masks = [torch.from_numpy(mask) for mask in batch.loss_masks]
    loss = -sum((lp * m).sum() for lp, m in zip(log_probs, masks, strict=True)) / sum(m.sum() for m in masks)
    check_against(qwen3, batch, report, grads, (model, loss))


def test_old_log_probs_are_computed_only_where_the_step_cannot_serve_itself(qwen3):
    def passes(num_steps=1, **changes):
        found = passes_of(config_for(qwen3, **changes), num_steps)
        return found.old, found.ref

    assert passes() == (False, False)
    assert passes(2) == (True, False)
    assert passes(kl_coef=0.1) == (True, True)
    assert passes(use_kl_loss=True) == (False, True)
    assert passes(advantage_estimator="gspo") == (True, False)
    assert passes(2, use_rollout_logprobs=True) == (False, False)
    assert passes(use_rollout_logprobs=True, get_mismatch_metrics=True) == (True, False)
    assert passes(2, loss_type="sft_loss") == (False, False)
    assert passes(2, compute_advantages_and_returns=False) == (False, False)


def test_user_functions_are_called_with_slimes_signatures(qwen3, monkeypatch):
    calls = []
    module = SimpleNamespace(__name__="made_up_hooks")

    def advantages(args, data):
        calls.append(("advantages", args.eps_clip, len(data["tokens"]), data["loss_masks"][0].shape))
        data["advantages"] = data["returns"] = [torch.full((n,), float(i)) for i, n in enumerate(data["response_lengths"])]

    def tis(*, args, pg_loss, train_log_probs, rollout_log_probs, loss_masks, total_lengths, response_lengths, **rest):
        calls.append(("tis", [len(x) for x in train_log_probs] == response_lengths, len(total_lengths)))
        return pg_loss * 0.5, [mask * 0 + 1 for mask in loss_masks], {"half": torch.full_like(pg_loss, 0.5)}

    def after_advantages(args, rollout_id, data):
        calls.append(("postprocess", rollout_id, [len(a) for a in data["advantages"]] == data["response_lengths"]))
        data["advantages"] = [a + 1 for a in data["advantages"]]

    def before_step(args, rollout_id, step_id, model, optimizer, scheduler):
        calls.append(("step", rollout_id, step_id, len(model)))

    def before_log_prob(args, model, store_prefix):
        calls.append(("log_prob", store_prefix))

    for function in (advantages, after_advantages, tis, before_step, before_log_prob):
        setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, "made_up_hooks", module)
    batch = rollout(3, seed=17)
    changes = dict(
        custom_advantage_function_path="made_up_hooks.advantages", use_tis=True, custom_tis_function_path="made_up_hooks.tis",
        custom_megatron_before_train_step_hook_path="made_up_hooks.before_step",
        rollout_data_postprocess_path="made_up_hooks.after_advantages",
        custom_megatron_before_log_prob_hook_path="made_up_hooks.before_log_prob", max_tokens_per_gpu=4096,
    )  # fmt: skip

    def run(rank: int):
        report, grads = step_of(rank, qwen3, changes, batch)
        return report, grads, calls

    report, grads, seen = run_ranks(1, run)[0]
    before = [("log_prob", ""), ("advantages", 0.2, 8, (24,)), ("postprocess", 3, True)]
    assert seen == [*before, ("step", 3, 0, 1), ("tis", True, 8)]
    model, log_probs, _ = hf_log_probs(qwen3, batch)
    loss = mean(batch, [-0.5 * (i + 1) * (lp - lp.detach()).exp() for i, lp in enumerate(log_probs)])
    check_against(qwen3, batch, report, grads, (model, loss))
    assert report.per_step[0]["train/half"] == pytest.approx(0.5 * np.mean([m.any() for m in batch.loss_masks]))


def drops_uneven_ratios(*, args, pg_loss, train_log_probs, rollout_log_probs, loss_masks, **rest):
    """Rejection as mis.yaml's mask mode: tokens whose ratio leaves [1/2, 2] are dropped, and their ratio is not a weight."""
    gaps = [train - rollout for train, rollout in zip(train_log_probs, rollout_log_probs, strict=True)]
    masks = [mask * (gap.abs() <= np.log(2.0)) for mask, gap in zip(loss_masks, gaps, strict=True)]
    return pg_loss, masks, {"dropped": 1 - torch.cat(masks)}


def test_a_token_that_the_importance_function_drops_is_dropped_from_every_term(qwen3, second, monkeypatch):
    """Policy loss, KL and entropy of the kept tokens, each over the tokens that were there before (slime's denominators)."""
    monkeypatch.setitem(sys.modules, "made_up_tis", SimpleNamespace(drop=drops_uneven_ratios))
    batch = rollout(seed=21)
    for values in batch.rollout_log_probs:
        values[::3] -= 3.0
    changes = dict(
        use_tis=True, custom_tis_function_path="made_up_tis.drop", use_kl_loss=True, kl_loss_coef=0.3, kl_loss_type="k2",
        entropy_coef=0.05, load=str(qwen3), ref_load=str(second),
    )  # fmt: skip
    report, grads = run_ranks(1, step_of, qwen3, changes, batch)[0]
    model, log_probs, entropies = hf_log_probs(qwen3, batch)
    with torch.no_grad():
        reference = hf_log_probs(second, batch)[1]
    kept = [
        ((lp.detach() - torch.from_numpy(old)).abs() <= np.log(2.0)).float()
        for lp, old in zip(log_probs, batch.rollout_log_probs, strict=True)
    ]
    share = mean(batch, [1 - keep for keep in kept]).item()
    assert 0.1 < share < 0.9, "the made-up rollout has both kinds of tokens"

    def kept_mean(values):
        return mean(batch, [value * keep for value, keep in zip(values, kept, strict=True)])

    pg = kept_mean([-float(r) * (lp - lp.detach()).exp() for r, lp in zip(batch.rewards, log_probs, strict=True)])
    kl = kept_mean([(lp - ref) ** 2 / 2 for lp, ref in zip(log_probs, reference, strict=True)])
    entropy = kept_mean(entropies)
    step = report.per_step[0]
    assert step["train/kl_loss"] == pytest.approx(kl.item(), rel=1e-4)
    assert step["train/entropy_loss"] == pytest.approx(entropy.item(), rel=1e-4)
    assert step["train/dropped"] == pytest.approx(share, rel=1e-5), "measured over all trained tokens"
    check_against(qwen3, batch, report, grads, (model, pg + 0.3 * kl - 0.05 * entropy))
    measured, _ = run_ranks(1, step_of, qwen3, changes | dict(use_tis=False, get_mismatch_metrics=True), batch)[0]
    assert measured.per_step[0]["train/dropped"] == pytest.approx(share, rel=1e-5)
    assert measured.per_step[0]["train/entropy_loss"] == pytest.approx(mean(batch, entropies).item(), rel=1e-4)


def test_icepop_by_its_public_name_is_finite_where_the_engine_gave_no_probability(qwen3):
    """Ratio inside [1/2, 2] as weight, 0 outside; -inf of the engine, trained or not, reaches no gradient."""
    batch = rollout(seed=22)
    for values in batch.rollout_log_probs:
        values[::4] -= 2.0
        values[1::5] = -np.inf
    path = "slime.backends.megatron_utils.loss.icepop_function"
    changes = dict(use_tis=True, custom_tis_function_path=path, tis_clip_low=0.5, tis_clip=2.0)
    report, grads = run_ranks(1, step_of, qwen3, changes, batch)[0]
    model, log_probs, _ = hf_log_probs(qwen3, batch)
    losses = []
    for lp, old, reward in zip(log_probs, batch.rollout_log_probs, batch.rewards, strict=True):
        ratio = np.exp(lp.detach().numpy().astype(np.float64) - old)
        weight = [r if 0.5 <= r <= 2.0 else 0.0 for r in ratio]
        losses.append(-float(reward) * (lp - lp.detach()).exp() * torch.tensor(weight, dtype=torch.float32))
    check_against(qwen3, batch, report, grads, (model, mean(batch, losses)))
    assert all(torch.isfinite(gradient).all() for gradient in grads.values())


@pytest.mark.parametrize("function", [None, icepop_function, drops_uneven_ratios])
def test_a_rank_without_a_sample_reports_the_same_names(function):
    """Sums of values are added over ranks by position, so a name that one rank lacks would shift all others."""
    batch = rollout(seed=24)
    values = dict(
        tis_clip_low=0.5, tis_clip=2.0, custom_tis_function_path=None, use_tis=True, tis_mode="mask", tis_level="sequence",
        tis_lower_bound=0.5, tis_upper_bound=2.0, use_rs=True, rs_level="token", rs_lower_bound=0.5, rs_upper_bound=2.0,
        rs_veto_threshold=1e-4,
    )  # fmt: skip
    config = SimpleNamespace(args=SimpleNamespace(**values), algorithm=SimpleNamespace(**values))
    objective = Objective(config, None, range(0), 1.0, None, function, None)
    names = []
    for positions in ((), (0, 1)):
        micro = pack(batch, positions, loss_weight=np.ones(len(batch)))
        loss = torch.ones(len(micro.loss_mask))
        weighted, kept, shown = objective._importance(micro, loss, torch.full_like(loss, -1.0))
        assert weighted.shape == kept.loss_mask.shape == loss.shape
        names.append(sorted(shown))
    assert names[0] == names[1]


def test_an_importance_function_that_answers_with_other_lengths_is_named(qwen3, monkeypatch):
    module = SimpleNamespace(short=lambda *, pg_loss, loss_masks, **rest: (pg_loss, loss_masks[:-1], {}))
    monkeypatch.setitem(sys.modules, "made_up_tis", module)
    changes = dict(use_tis=True, custom_tis_function_path="made_up_tis.short")
    with pytest.raises(RankFailed, match="--custom-tis-function-path made_up_tis.short gave a loss of .* and masks of"):
        run_ranks(1, step_of, qwen3, changes, rollout(seed=23))


def test_a_users_reducer_sums_and_the_step_divides(qwen3, monkeypatch):
    def dr_grpo(total_lengths, response_lengths, loss_masks, calculate_per_token_loss):
        """Dr. GRPO: every token divided by one constant instead of its sample's length."""
        assert calculate_per_token_loss is False
        return lambda x: sum((part * mask).sum() for part, mask in zip(x.split(response_lengths), loss_masks, strict=True)) / 24

    monkeypatch.setitem(sys.modules, "made_up_reducer", SimpleNamespace(dr_grpo=dr_grpo))
    batch = rollout(seed=19)
    changes = dict(custom_pg_loss_reducer_function_path="made_up_reducer.dr_grpo")
    report, grads = run_ranks(1, step_of, qwen3, changes, batch)[0]
    model, log_probs, _ = hf_log_probs(qwen3, batch)
    masks = [torch.from_numpy(mask) for mask in batch.loss_masks]
    losses = zip(batch.rewards, log_probs, masks, strict=True)
    loss = sum((-float(r) * (lp - lp.detach()).exp() * m).sum() for r, lp, m in losses) / 24 / len(batch)
    check_against(qwen3, batch, report, grads, (model, loss))
    other = run_ranks(2, step_of, qwen3, changes, batch, 2)[0][0]
    assert other.per_step[0]["train/grad_norm"] == pytest.approx(report.per_step[0]["train/grad_norm"], rel=1e-5)


def test_router_losses_are_refused_because_no_step_plan_weighs_them(glm):
    config = config_for(glm)
    config.model.megatron["moe_aux_loss_coeff"] = 0.01
    with pytest.raises(RankFailed, match="--moe-aux-loss-coeff 0.01.*pass 0"):
        run_ranks(1, lambda rank: start(config))


def test_a_wrong_dotted_path_ends_the_run_at_its_start(qwen3):
    def build(rank: int, **changes):
        start(config_for(qwen3, **changes))

    with pytest.raises(RankFailed, match="--custom-advantage-function-path nowhere.at.all: module nowhere.at cannot"):
        run_ranks(1, lambda rank: build(rank, custom_advantage_function_path="nowhere.at.all"))
    with pytest.raises(RankFailed, match="--custom-tis-function-path os.path.nothing: module os.path has no 'nothing'"):
        run_ranks(1, lambda rank: build(rank, custom_tis_function_path="os.path.nothing"))


def test_a_rollout_without_a_trained_token_changes_nothing_but_keeps_every_rank_in_step(qwen3):
    from dataclasses import replace

    batch = rollout(seed=18)
    batch = replace(batch, loss_masks=tuple(np.zeros_like(mask) for mask in batch.loss_masks))
    for report, _ in run_ranks(2, step_of, qwen3, dict(weight_decay=0.0, pipeline_model_parallel_size=2), batch, 2):
        assert report.per_step[0]["train/loss"] == 0.0 and report.per_step[0]["train/grad_norm"] == 0.0


def test_a_removed_sample_has_no_place_for_reinforce_plus_plus_and_needs_none(qwen3):
    batch = rollout(seed=20)
    batch.loss_masks[3][:] = 0
    columns = Columns(positions=tuple(range(len(batch))))
    fill_advantages(columns, batch, config_for(qwen3, advantage_estimator="reinforce_plus_plus"), ranks=None)
    assert not columns.advantages[3].any() and len(columns.advantages[3]) == batch.response_lengths[3]
    last = np.flatnonzero(batch.loss_masks[0])[-1]
    assert columns.advantages[0][last] == pytest.approx(batch.rewards[0]), "the others have theirs on the last trained token"


@pytest.mark.parametrize("estimator", ["grpo", "gspo"])
def test_what_the_engine_says_of_untrained_tokens_reaches_no_gradient(qwen3, estimator):
    batch = rollout(seed=31)
    for values, mask in zip(batch.rollout_log_probs, batch.loss_masks, strict=True):
        values[mask == 0] = -4.0
    changes = dict(use_rollout_logprobs=True, advantage_estimator=estimator)
    clean, grads = run_ranks(1, step_of, qwen3, changes, batch)[0]
    for values, mask in zip(batch.rollout_log_probs, batch.loss_masks, strict=True):
        values[mask == 0] = -np.inf
    report, same = run_ranks(1, step_of, qwen3, changes, batch)[0]
    assert report.per_step == clean.per_step
    assert all(torch.equal(grads[name], same[name]) for name in grads)


def test_mismatch_metrics_compare_trainer_with_engine_also_where_the_engines_are_the_old_ones(qwen3, monkeypatch):
    module = SimpleNamespace(__name__="mismatch_hooks")

    def gap(*, pg_loss, train_log_probs, rollout_log_probs, loss_masks, **rest):
        difference = torch.cat(list(train_log_probs)) - torch.cat(list(rollout_log_probs))
        return pg_loss, list(loss_masks), {"gap": difference}

    module.gap = gap
    monkeypatch.setitem(sys.modules, "mismatch_hooks", module)
    batch = rollout(seed=32)
    changes = dict(use_rollout_logprobs=True, get_mismatch_metrics=True, custom_tis_function_path="mismatch_hooks.gap")
    report, _ = run_ranks(1, step_of, qwen3, changes, batch)[0]
    _, log_probs, _ = hf_log_probs(qwen3, batch)
    gaps = [lp.detach() - torch.from_numpy(old) for lp, old in zip(log_probs, batch.rollout_log_probs, strict=True)]
    assert report.per_step[0]["train/gap"] == pytest.approx(mean(batch, gaps).item(), rel=1e-4)


MASK_MODE = dict(tis_mode="mask", tis_lower_bound=0.5, tis_upper_bound=2.0)


def test_importance_sampling_by_flags_drops_what_the_same_function_of_a_user_drops(qwen3, monkeypatch):
    """--tis-mode mask with the ratio as weight, and --use-rs alone, where the user's function has weight 1."""
    monkeypatch.setitem(sys.modules, "made_up_tis", SimpleNamespace(drop=drops_uneven_ratios))
    batch = rollout(seed=21)
    for values in batch.rollout_log_probs:
        values[::3] -= 3.0
    same = dict(entropy_coef=0.05)
    own, by_hand = run_ranks(1, step_of, qwen3, same | dict(use_tis=True, custom_tis_function_path="made_up_tis.drop"), batch)[
        0
    ]
    flags = same | dict(use_rs=True, rs_lower_bound=0.5, rs_upper_bound=2.0) | MASK_MODE
    report, grads = run_ranks(1, step_of, qwen3, flags, batch)[0]
    assert report.per_step[0]["train/loss"] == pytest.approx(own.per_step[0]["train/loss"], rel=1e-5)
    assert report.per_step[0]["train/rs_dropped"] == pytest.approx(own.per_step[0]["train/dropped"], rel=1e-5)
    name = "embedding.word_embeddings.weight"
    torch.testing.assert_close(grads[name], by_hand[name], rtol=1e-3, atol=1e-7)
    report, grads = run_ranks(1, step_of, qwen3, dict(use_tis=True, **MASK_MODE), batch)[0]
    model, log_probs, _ = hf_log_probs(qwen3, batch)
    losses = []
    for lp, old, reward in zip(log_probs, batch.rollout_log_probs, batch.rewards, strict=True):
        ratio = np.exp(lp.detach().numpy().astype(np.float64) - old)
        weight = torch.tensor([r if 0.5 <= r <= 2.0 else 0.0 for r in ratio], dtype=torch.float32)
        losses.append(-float(reward) * (lp - lp.detach()).exp() * weight)
    check_against(qwen3, batch, report, grads, (model, mean(batch, losses)))


def test_weights_are_divided_by_their_mean_over_the_whole_step_however_it_is_cut(qwen3):
    batch = rollout(seed=21)
    changes = dict(use_tis=True, tis_mode="truncate", tis_lower_bound=0.0, tis_upper_bound=2.0, tis_batch_normalize=True)
    report, grads = run_ranks(1, step_of, qwen3, changes, batch)[0]
    model, log_probs, _ = hf_log_probs(qwen3, batch)
    weights = [
        np.minimum(np.exp(lp.detach().numpy().astype(np.float64) - old), 2.0)
        for lp, old in zip(log_probs, batch.rollout_log_probs, strict=True)
    ]
    average = np.concatenate([w[m > 0] for w, m in zip(weights, batch.loss_masks, strict=True)]).mean()
    losses = [
        -float(reward) * (lp - lp.detach()).exp() * torch.tensor(weight / average, dtype=torch.float32)
        for lp, weight, reward in zip(log_probs, weights, batch.rewards, strict=True)
    ]
    check_against(qwen3, batch, report, grads, (model, mean(batch, losses)))
    one = report.per_step[0]["train/grad_norm"]
    for world, cut in ((1, dict(max_tokens_per_gpu=4096)), (2, {})):
        other = run_ranks(world, step_of, qwen3, changes | cut, batch, world)[0][0]
        assert other.per_step[0]["train/grad_norm"] == pytest.approx(one, rel=1e-5), (world, cut)


def test_dr_grpo_divides_every_sample_by_one_constant(qwen3):
    batch = rollout(seed=19)
    changes = dict(pg_loss_length=24, entropy_coef=0.05)
    report, grads = run_ranks(1, step_of, qwen3, changes, batch)[0]
    model, log_probs, entropies = hf_log_probs(qwen3, batch)
    masks = [torch.from_numpy(mask) for mask in batch.loss_masks]
    losses = zip(batch.rewards, log_probs, masks, strict=True)
    loss = sum((-float(r) * (lp - lp.detach()).exp() * m).sum() for r, lp, m in losses) / 24 / len(batch)
    check_against(qwen3, batch, report, grads, (model, loss - 0.05 * mean(batch, entropies)))
    other = run_ranks(2, step_of, qwen3, changes, batch, 2)[0][0]
    assert other.per_step[0]["train/grad_norm"] == pytest.approx(report.per_step[0]["train/grad_norm"], rel=1e-5)


@pytest.mark.parametrize("estimator", ["grpo", "gspo", "cispo"])
def test_a_trained_token_to_which_the_engine_gave_no_probability_is_finite_as_an_old_one_too(qwen3, estimator):
    batch = rollout(seed=31)
    for values in batch.rollout_log_probs:
        values[::5] = -np.inf
    changes = dict(use_rollout_logprobs=True, advantage_estimator=estimator, use_opsm=True, use_unbiased_kl=True)
    report, grads = run_ranks(1, step_of, qwen3, changes, batch)[0]
    named = {name: value for name, value in report.per_step[0].items() if name != "train/train_rollout_logprob_abs_diff"}
    assert all(np.isfinite(value) for value in named.values()), named
    assert all(gradient.isfinite().all() for gradient in grads.values())
