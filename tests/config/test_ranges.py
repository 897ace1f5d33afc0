"""Every number has a range, declared with its flag, at the command line and in both YAML files."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime.config import ConfigError
from slime.config.command_line import flag_table
from slime.config.flags import Flag
from tests.config.flags import config_of

OUTSIDE = [
    ("--lr inf", "--lr must be a finite number, got inf"),
    ("--lr nan", "--lr must be a finite number, got nan"),
    ("--lr 0", "--lr must be above 0 and at most 1, got 0"),
    ("--lr -1e-6", "--lr must be above 0 and at most 1, got -1e-06"),
    ("--min-lr -1", "--min-lr must be at least 0, got -1"),
    ("--adam-beta2 1", "--adam-beta2 must be at least 0 and below 1, got 1"),
    ("--adam-eps 0", "--adam-eps must be above 0, got 0"),
    ("--weight-decay -0.1", "--weight-decay must be at least 0, got -0.1"),
    ("--clip-grad -1", "--clip-grad must be at least 0, got -1"),
    ("--tis-clip -1", "--tis-clip must be above 0, got -1"),
    ("--tis-clip-low -2", "--tis-clip-low must be at least 0, got -2"),
    ("--eps-clip -0.2", "--eps-clip must be at least 0, got -0.2"),
    ("--eps-clip-high -0.2", "--eps-clip-high must be at least 0, got -0.2"),
    ("--kl-coef -1", "--kl-coef must be at least 0, got -1"),
    ("--gamma 1.1", "--gamma must be at least 0 and at most 1, got 1.1"),
    ("--entropy-coef inf", "--entropy-coef must be a finite number, got inf"),
    ("--update-weight-buffer-size 0", "--update-weight-buffer-size must be at least 1, got 0"),
    ("--data-pad-size-multiplier -1", "--data-pad-size-multiplier must be at least 1, got -1"),
    ("--optimizer-offload-fraction 1.5", "--optimizer-offload-fraction must be at least 0 and at most 1, got 1.5"),
    ("--rollout-top-p 0", "--rollout-top-p must be above 0 and at most 1, got 0"),
    ("--rollout-top-k 0", "--rollout-top-k must be -1 or at least 1, got 0"),
    ("--log-probs-chunk-size -2", "--log-probs-chunk-size must be -1 or at least 1, got -2"),
    ("--rollout-temperature -1", "--rollout-temperature must be above 0, got -1"),
    ("--eval-temperature -1", "--eval-temperature must be at least 0, got -1"),
    ("--rollout-max-response-len 0", "--rollout-max-response-len must be at least 1, got 0"),
    ("--sglang-router-port 70000", "--sglang-router-port must be at least 1 and at most 65535, got 70000"),
    ("--hidden-dropout 1", "--hidden-dropout must be at least 0 and below 1, got 1"),
    ("--norm-epsilon 0", "--norm-epsilon must be above 0 and below 1, got 0"),
    ("--num-layers 0", "--num-layers must be at least 1, got 0"),
    ("--recompute-num-layers -1", "--recompute-num-layers must be at least 1, got -1"),
    ("--moe-router-bias-update-rate -1", "--moe-router-bias-update-rate must be at least 0, got -1"),
    ("--rotary-percent 1.5", "--rotary-percent must be above 0 and at most 1, got 1.5"),
    ("--num-rollout -1", "--num-rollout must be at least 0, got -1"),
    ("--n-samples-per-eval-prompt 0", "--n-samples-per-eval-prompt must be at least 1, got 0"),
    ("--context-parallel-size 0", "--context-parallel-size must be at least 1, got 0"),
    ("--ckpt-step -5", "--ckpt-step must be at least 0, got -5"),
]


@pytest.mark.parametrize(("words", "message"), OUTSIDE)
def test_a_number_outside_its_range_is_refused(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(*words.split())
    assert message in str(caught.value).split("\n")


def _is_free_number(row: Flag) -> bool:
    try:
        value = row.convert("1")
    except ValueError:
        return False
    return isinstance(value, int | float) and not hasattr(row.convert, "choices") and not str(row.convert.bounds)


def test_no_number_is_taken_without_a_range() -> None:
    """Free in sign is only what has a meaning below 0, or a converter of its own."""
    free = {row.name for row in flag_table().values() if not row.later and row.num_values != 0 and _is_free_number(row)}
    assert free == {
        "--entropy-coef", "--glu-linear-offset", "--activation-func-clamp-value", "--window-attn-skip-freq", "--qk-clip-alpha",
        "--qk-clip-threshold", "--no-rope-freq", "--moe-layer-freq", "--mrope-section", "--beta-fast", "--beta-slow",
        "--mscale", "--mscale-all-dim",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rollout_temperature: 0", "--rollout-temperature must be above 0, got 0"),
        ("lr: .inf", "--lr must be a finite number, got inf"),
        ("hidden_dropout: 2", "--hidden-dropout must be at least 0 and below 1, got 2"),
        ("rollout_batch_size: {a: 1}", "--rollout-batch-size wants a whole number"),
        ("n_samples_per_prompt: null", "wants a value, got null"),
        ("prompt_data: {a: 1}", "wants one value, got the mapping"),
    ],
)
def test_a_yaml_override_has_the_flags_range(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "custom.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        config_of("--custom-config-path", str(file))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("temperature: -1", "must be at least 0, got -1"),
        ("top_p: 2", "must be above 0 and at most 1, got 2"),
        ("max_response_len: 0", "must be at least 1, got 0"),
        ("n_samples_per_eval_prompt: -1", "must be at least 1, got -1"),
        ("stop_token_ids: [3, -1]", "must be at least 0, got -1"),
        ("max_response_len: .inf", "Infinity|infinity"),
    ],
)
def test_a_setting_of_an_eval_data_set_has_its_range(setting: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "eval.yaml"
    file.write_text(f"datasets:\n  - {{name: a, path: a.jsonl, {setting}}}\n")
    with pytest.raises(ConfigError, match=message):
        config_of("--eval-config", str(file))
