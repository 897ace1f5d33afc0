"""scripts/run-glm5.2-mini.sh is the flagship recipe with other numbers, and can be launched on every size that it names."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from rehearse.recipes import Recipe, recorded

from slime.rehearse.command import rehearse
from slime.rehearse.options import Options

ONLY_IN_A_CLUSTER = {"--sglang-disaggregation-ib-device"}
SAID_PER_GROUP = {"dp_size", "ep_size", "enable_dp_attention", "enable_dp_lm_head", "moe_dense_tp_size"}


def engine_flags(recipe: Recipe) -> set[str]:
    return {word for word in recipe.argv if word.startswith("--sglang-")}


def groups(recipe: Recipe) -> list[dict]:
    return yaml.safe_load(recipe.yaml)["sglang"][0]["server_groups"]


@pytest.mark.parametrize("num_gpus", [1, 2, 4, 8])
def test_it_is_launchable_on_every_number_of_gpus(num_gpus: int, tmp_path: Path) -> None:
    recipe = recorded("run-glm5.2-mini.sh", tmp_path, NUM_GPUS=str(num_gpus), BASE_DIR=str(tmp_path / "base"))
    done = rehearse(recipe.written(tmp_path), Options(env=recipe.env, build_ranks=False, gpu_memory_gb=141.0))
    assert done.findings.verdict == "launchable", [finding.line() for finding in done.findings.of("violation")]
    assert sum(group["num_gpus"] for group in groups(recipe)) == num_gpus


def test_its_engines_have_every_setting_of_the_flagships(tmp_path: Path) -> None:
    (tmp_path / "mini").mkdir()
    (tmp_path / "flagship").mkdir()
    mini = recorded("run-glm5.2-mini.sh", tmp_path / "mini", NUM_GPUS="8", BASE_DIR=str(tmp_path / "base"))
    flagship = recorded("run-glm5.2-744B-A40B.sh", tmp_path / "flagship")
    of_groups = {f"--sglang-{name.replace('_', '-')}" for name in SAID_PER_GROUP}
    assert engine_flags(flagship) - ONLY_IN_A_CLUSTER - of_groups == engine_flags(mini) - {"--sglang-server-concurrency"}
    for ours, theirs in zip(groups(mini), groups(flagship), strict=True):
        assert ours["worker_type"] == theirs["worker_type"]
        assert set(ours["overrides"]) == set(theirs["overrides"])
        assert ours["num_gpus_per_engine"] >= 2
