"""A function or class that a flag names exists, whichever flag it is, as far as its package is on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime.rehearse.result import Options, rehearse
from tests.rehearse.recipes import Recipe

NAMED = {
    "a data source": (("--data-source-path", "slime.rollout.data_source.Nope"), "data_source.py defines no Nope"),
    "a module": (("--rollout-function-path", "slime.rollout.nowhere.f"), "there is no module slime.rollout.nowhere"),
    "one hook of two": (
        ("--rollout-sample-hook-path", "slime.rollout.nowhere.f"),
        "--rollout-sample-hook-path slime.rollout.nowhere.f: there is no module",
    ),
    "a layer spec": (("--spec", "slime_plugins.models.glm5.glm5", "get_spec"), "glm5.py defines no get_spec"),
    "a provider": (("--custom-model-provider-path", "slime.model.build.my_model"), "build.py defines no my_model"),
    "no path": (("--custom-rm-path", "grade"), "--custom-rm-path grade is no dotted path of a function"),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_name_that_its_module_lacks_is_told(name: str, flagship: Recipe, tmp_path: Path) -> None:
    words, message = NAMED[name]
    recipe = flagship.with_flag(*words)
    done = rehearse(recipe.written(tmp_path), Options(env=recipe.env, quick=True, build_ranks=False))
    told = [finding.line() for finding in done.findings.of("violation")]
    assert any(message in line for line in told), told


def test_a_package_that_is_elsewhere_is_unchecked(flagship: Recipe, tmp_path: Path) -> None:
    recipe = flagship.with_flag("--custom-rm-path", "rewards_of_mine.grade")
    done = rehearse(recipe.written(tmp_path), Options(env=recipe.env, quick=True, build_ranks=False))
    assert done.findings.verdict == "launchable"
    assert any("--custom-rm-path rewards_of_mine.grade" in finding.what for finding in done.findings.of("unchecked"))


CALLED = {
    "too few arguments": (
        "def grade(sample): ...",
        "found grade(sample) (too many positional arguments); expected async fn(args, sample",
    ),
    "too many": ("async def grade(args, sample, gold): ...", "missing a required argument: 'gold'"),
    "awaited and plain": (
        "def grade(args, sample, **kwargs): ...",
        "found a plain function; expected async fn(args, sample, **kwargs)",
    ),
}


@pytest.mark.parametrize("name", CALLED)
def test_arguments_are_asked_of_the_source(
    name: str, flagship: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, message = CALLED[name]
    (tmp_path / "judge_of_mine.py").write_text(f"import a_package_that_is_not_here\n{source}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = flagship.with_flag("--custom-rm-path", "judge_of_mine.grade")
    done = rehearse(recipe.written(tmp_path), Options(env=recipe.env, quick=True, build_ranks=False))
    told = [finding.line() for finding in done.findings.of("violation")]
    assert any("--custom-rm-path judge_of_mine.grade" in line and message in line for line in told), told


def test_functions_of_one_evaluation_are_asked_too(flagship: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "judge_of_mine.py").write_text("async def grade(args, sample): ...\ndef play(args): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "eval.yaml").write_text(
        "datasets:\n"
        "  - {name: a, path: /data/a.jsonl, custom_rm_path: judge_of_mine.grade}\n"
        "  - {name: b, path: /data/b.jsonl, custom_rm_path: judge_of_mine.grades}\n"
        "  - {name: c, path: /data/c.jsonl, custom_generate_function_path: judge_of_mine.play}\n"
    )
    recipe = flagship.with_flag("--eval-config", str(tmp_path / "eval.yaml")).with_flag("--eval-interval", "5")
    done = rehearse(recipe.written(tmp_path), Options(env=recipe.env, quick=True, build_ranks=False))
    told = "\n".join(finding.line() for finding in done.findings.of("violation"))
    assert "evaluation a" not in told
    assert "evaluation b: custom_rm_path judge_of_mine.grades" in told and "defines no grades" in told
    assert "evaluation c: custom_generate_function_path judge_of_mine.play: found play(args)" in told
