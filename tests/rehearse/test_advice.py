"""The advice on cost against numbers by hand: waves, the knee, and what a token costs there."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime.rehearse.model.advice import advise
from slime.rehearse.model.cost import Cost, CostPhase
from slime.rehearse.result import Options, rehearse
from tests.rehearse.recipes import Recipe


def cost_of(prompts: int, waves: int) -> Cost:
    """100 s of generation a wave and 1 s of training a prompt, on 36 GPUs; 1,000 tokens a prompt."""
    phases = (CostPhase("rollout", 100.0 * waves, ""), CostPhase("train", 1.0 * prompts, ""))
    return Cost(1000 * prompts, 1.0, 3.0, 1.0, phases, None, 36)


def test_samples_are_nearly_free_until_the_engines_are_full() -> None:
    advice = advise(cost_of, prompts=10, samples_per_prompt=4, steps=2, held=170)
    assert [(batch.prompts, batch.samples, batch.waves) for batch in advice.batches] == [
        (10, 40, 1), (20, 80, 1), (40, 160, 1), (42, 168, 1), (80, 320, 2), (160, 640, 4),
    ]  # fmt: skip
    # 110 s of 36 GPUs are 1.1 GPU-hours for 10,000 tokens; 142 s are 1.42 for 42,000.
    assert advice.batches[0].per_million == pytest.approx(110.0) and advice.knee.per_million == pytest.approx(1.42 / 0.042)
    assert advice.flags == "--rollout-batch-size 42 --global-batch-size 84"
    assert advice.gain == pytest.approx(110 / (1.42 / 0.042))


def test_nothing_is_advised_where_no_engine_decodes() -> None:
    assert advise(cost_of, prompts=10, samples_per_prompt=4, steps=1, held=3) is None


def test_the_recipe_keeps_few_samples_on_many_engines(flagship: Recipe, tmp_path: Path) -> None:
    """Three decode engines of 64 ranks hold six of the longest samples each rank by cache, 768 requests by flag: 3 x 384."""
    done = rehearse(flagship.written(tmp_path), Options(env=flagship.env, build_ranks=False, engine_version="0.5.23"))
    assert done.advice.held == 3 * 6 * 64 == 1152
    assert (done.advice.knee.prompts, done.advice.knee.samples) == (144, 1152)
    assert done.advice.batches[0].samples == 64 and done.advice.gain > 5
    pasted = flagship.with_flag("--rollout-batch-size", "144").with_flag("--global-batch-size", "1152")
    again = rehearse(pasted.written(tmp_path), Options(env=flagship.env, build_ranks=False, engine_version="0.5.23"))
    assert again.findings.launchable and again.cost.gpu_hours == pytest.approx(done.advice.knee.gpu_hours, rel=0.02)
