"""On-policy distillation against a plain formula on transformers' log-probs of student and teacher."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import RankFailed, run_ranks
from test_objectives import check_against, hf_log_probs, mean, plain_mean, second, step_of  # noqa: F401
from tiny import VOCAB, config_for, plans, rollout, start

from slime.batch.pack import pack
from slime.config.passes import passes_of
from slime.training.forward import run_chunk
from slime.types import RolloutBatch

pytestmark = pytest.mark.slow

MEGATRON = dict(use_opd=True, opd_type="megatron", opd_kl_coef=0.7)


def distilled(batch, log_probs, teacher, coef: float = 0.7):
    """(loss of transformers' graph, mean reverse KL)."""
    gaps = [mine.detach() - other for mine, other in zip(log_probs, teacher, strict=True)]
    advantages = [float(r) - coef * gap for r, gap in zip(batch.rewards, gaps, strict=True)]
    losses = [-a * (lp - lp.detach()).exp() for a, lp in zip(advantages, log_probs, strict=True)]
    return mean(batch, losses), gaps


def test_a_teacher_in_weights_lowers_the_advantage_of_what_it_finds_unlikely(qwen3, second):  # noqa: F811
    batch = rollout(seed=41)
    changes = dict(load=str(qwen3), opd_teacher_load=str(second), **MEGATRON)
    report, grads = run_ranks(1, step_of, qwen3, changes, batch)[0]
    model, log_probs, _ = hf_log_probs(qwen3, batch)
    with torch.no_grad():
        teacher = hf_log_probs(second, batch)[1]
    loss, gaps = distilled(batch, log_probs, teacher)
    check_against(qwen3, batch, report, grads, (model, loss))
    assert report.metrics["rollout/opd_reverse_kl"] == pytest.approx(plain_mean(batch, gaps), rel=1e-4)
    assert report.metrics["rollout/teacher_log_probs"] == pytest.approx(plain_mean(batch, teacher), rel=1e-4)
    assert report.per_step[0]["train/opd_reverse_kl"] == pytest.approx(mean(batch, gaps).item(), rel=1e-4)
    assert report.per_step[0]["train/ppo_kl"] == 0.0, "the student's own weights are back"
    whitened = changes | dict(normalize_advantages=True)
    one, two = (run_ranks(n, step_of, qwen3, whitened, batch, n)[0][0] for n in (1, 2))
    assert two.per_step[0]["train/grad_norm"] == pytest.approx(one.per_step[0]["train/grad_norm"], rel=1e-5)
    split = changes | dict(pipeline_model_parallel_size=2)
    staged = run_ranks(2, step_of, qwen3, split, batch, 2)[0][0]
    assert staged.per_step[0]["train/grad_norm"] == pytest.approx(report.per_step[0]["train/grad_norm"], rel=1e-4)


def test_a_servers_log_probs_do_the_same_and_an_impossible_token_stays_finite(qwen3, second):  # noqa: F811
    batch = rollout(seed=42)
    with torch.no_grad():
        teacher = hf_log_probs(second, batch)[1]
    columns = [values.numpy().copy() for values in teacher]
    columns[0][3] = -np.inf
    changes = dict(use_opd=True, opd_type="sglang", opd_kl_coef=0.7)
    report, grads = run_ranks(1, step_of, qwen3, changes, replace(batch, teacher_log_probs=tuple(columns)))[0]
    model, log_probs, _ = hf_log_probs(qwen3, batch)
    teacher[0][3] = log_probs[0][3].detach() - 20  # log-ratios are bounded there
    loss, _ = distilled(batch, log_probs, teacher)
    check_against(qwen3, batch, report, grads, (model, loss))
    with pytest.raises(RankFailed, match="no sample of this rollout has teacher_log_probs; let slime.rollout.on_policy"):
        run_ranks(1, step_of, qwen3, changes, batch)


def test_distillation_needs_the_pass_of_the_students_own_log_probs(qwen3):
    def passes(**changes):
        found = passes_of(config_for(qwen3, **changes), 1)
        return found.old, found.ref, found.teacher

    assert passes(**MEGATRON) == (True, False, True)
    assert passes(use_opd=True, opd_type="sglang") == (True, False, False)
    assert passes(use_opd=True, opd_type="sglang", use_rollout_logprobs=True) == (True, False, False)
    assert passes(loss_type="sft_loss", use_opd=True, opd_type="megatron") == (False, False, False)


def test_the_hook_before_a_pass_is_told_that_it_is_the_teachers(qwen3, second, monkeypatch):  # noqa: F811
    from types import SimpleNamespace

    seen = []
    module = SimpleNamespace(tell=lambda args, model, store_prefix: seen.append(store_prefix))
    monkeypatch.setitem(sys.modules, "made_up_hook", module)

    def run(rank: int):
        changes = dict(opd_teacher_load=str(second), custom_megatron_before_log_prob_hook_path="made_up_hook.tell", **MEGATRON)
        step_of(rank, qwen3, changes, rollout(seed=43))
        return seen

    assert run_ranks(1, run)[0] == ["teacher_", ""]


def test_a_teachers_folder_without_a_model_is_named_by_its_flag(qwen3, tmp_path):
    with pytest.raises(RankFailed, match=f"--opd-teacher-load {tmp_path} has neither .* nor a config.json"):
        run_ranks(1, step_of, qwen3, dict(opd_teacher_load=str(tmp_path), **MEGATRON), rollout())


PREFIXES, DRAWS = 8, 16


def next_words(trainer, rows) -> torch.Tensor:
    """The trained model's distribution of the word after each row, [rows, VOCAB] float64."""
    found = []
    for row in rows:
        micro = pack(one_word_answers([np.append(row, 0)], 0), (0,), loss_weight=np.ones(1))
        with torch.no_grad():
            logits = run_chunk(trainer.pipeline.chunks[0], micro).logits()[0, len(row) - 1, :VOCAB]
        found.append(torch.softmax(logits.double() / 0.8, -1))
    return torch.stack(found)


def one_word_answers(tokens, rollout_id: int) -> RolloutBatch:
    """Each row's last word is its response; nothing but the teacher rewards."""
    n = len(tokens)
    return RolloutBatch(
        rollout_id=rollout_id, tokens=tuple(tokens), response_lengths=np.ones(n, np.int64), groups=np.arange(n),
        loss_masks=tuple(np.ones(1, np.float32) for _ in tokens), rewards=np.zeros(n, np.float32),
        raw_rewards=np.zeros(n, np.float32), trajectories=np.arange(n), sample_ids=np.arange(n), truncated=np.zeros(n, bool),
    )  # fmt: skip


def test_the_divergence_to_the_teacher_falls(qwen3, second):  # noqa: F811
    """The student samples its own answers to eight prompts; the divergence is the exact one, over the whole vocabulary."""
    rng = np.random.default_rng(7)
    prompts = [rng.integers(1, VOCAB, 5) for _ in range(PREFIXES)]
    teacher, _, _ = hf_log_probs(second, rollout())
    with torch.no_grad():
        log_q = torch.stack(
            [torch.log_softmax(teacher(torch.from_numpy(row)[None]).logits[0, -1].double() / 0.8, -1) for row in prompts]
        )

    def run(rank: int):
        changes = dict(opd_teacher_load=str(second), lr=3e-3, global_batch_size=PREFIXES * DRAWS, max_tokens_per_gpu=4096)
        trainer = start(config_for(qwen3, **changes, **MEGATRON | dict(opd_kl_coef=1.0)), load=False)
        trainer.load()
        told, exact = [], []
        for rollout_id in range(15):
            p = next_words(trainer, prompts)
            exact.append(float((p * (p.log() - log_q)).sum(-1).mean()))
            words = [rng.choice(VOCAB, size=DRAWS, p=row / row.sum()) for row in p.numpy()]
            tokens = [np.append(row, word) for row, drawn in zip(prompts, words, strict=True) for word in drawn]
            batch = one_word_answers(tokens, rollout_id)
            told.append(trainer.train(batch, plans(batch, trainer.config, 1)).metrics["rollout/opd_reverse_kl"])
        return told, exact

    told, exact = run_ranks(1, run)[0]
    assert exact[-1] < 0.5 * exact[0], exact
    assert np.mean(told) == pytest.approx(np.mean(exact), rel=0.25), "what is reported is an estimate of the divergence"
