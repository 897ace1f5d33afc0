"""docs/en/get_started/metrics.md lists every metric that the code can write, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from metrics_page import listed, not_listed

ROOT = Path(__file__).resolve().parents[2]
PREFIX = re.compile(r"(rollout|train|perf|eval|passrate|multi_turn)/")
NAME = re.compile(PREFIX.pattern + r"[^\s/]")
STATISTICS = ("mean", "median", "max", "min")


def texts_of(tree: ast.AST) -> Iterator[str]:
    """Every string, an f-string with {} for its values."""
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside |= {id(part) for part in node.values}
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


def parse(file: str) -> ast.AST:
    return ast.parse((ROOT / "slime" / file).read_text())


def written_by_name() -> set[str]:
    """Metrics whose name stands anywhere in the sources, but for the module that puts names together."""
    names = set()
    for file in (ROOT / "slime").rglob("*.py"):
        if file != ROOT / "slime" / "rollout" / "metrics.py":
            names |= {text for text in texts_of(ast.parse(file.read_text())) if NAME.match(text) and " " not in text}
    return names - {"rollout/{}", "train/{}", "train/critic-{}", "perf/{}_time"}  # each has a function below


def written_as_columns() -> set[str]:
    """rollout/{column} of slime.training.columns.rollout_metrics."""
    function = next(n for n in parse("training/columns.py").body if getattr(n, "name", "") == "rollout_metrics")
    loops = [node.iter for node in ast.walk(function) if isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple)]
    columns = {constant.value for names in loops for constant in names.elts}
    assert {"old_log_probs", "teacher_log_probs"} <= columns
    return {f"rollout/{'log_probs' if name == 'old_log_probs' else name}" for name in columns}


def written_of_samples() -> set[str]:
    """slime.rollout.metrics, whose names are put together from a prefix and a part."""
    names = {text for text in texts_of(parse("rollout/metrics.py")) if PREFIX.match(text) and " " not in text}
    common = ("truncated_ratio", "repetition_frac", *(f"response_len/{statistic}" for statistic in STATISTICS))
    rates = {"passrate/": "passrate/pass@{}", "eval/{}-": "eval/{}-pass@{}"}
    of_prefixes = {f"{prefix}{name}" for prefix in ("rollout/", "eval/{}/") for name in common}
    with_statistics = {f"{name}/{kind}" for name in names for kind in STATISTICS if _is_statistics(name)}
    plain = {name for name in names if not name.endswith(("/", "-")) and not _is_statistics(name)}
    return plain | of_prefixes | with_statistics | set(rates.values())


def _is_statistics(name: str) -> bool:
    calls = [
        n for n in ast.walk(parse("rollout/metrics.py")) if isinstance(n, ast.Call) and ast.unparse(n.func) == "statistics"
    ]
    return name in {call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)}


def written_of_steps() -> set[str]:
    """train/*: keys of the mappings that the loss and the step make; train/critic-* of the critic's."""
    step = next(n for n in ast.walk(parse("training/trainer.py")) if getattr(n, "name", "") == "step")
    actors = _keys(parse("training/loss.py"), parse("training/importance_functions.py"), step)
    critics = _keys(parse("training/critic.py"), step) - {"loss", "step"}
    return {f"train/{name}" for name in actors} | {f"train/critic-{name}" for name in critics}


def _keys(*trees: ast.AST) -> set[str]:
    names = set()
    for tree in trees:
        for node in ast.walk(tree):
            is_set = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)
            keys = node.keys if isinstance(node, ast.Dict) else [node.slice] if is_set else []
            names |= {text for key in keys if isinstance(key, ast.Constant) for text in texts_of(key)}
        for node in (n for n in ast.walk(tree) if isinstance(n, ast.DictComp)):
            names |= {text for text in texts_of(node.key) if not text.startswith("train/")}
    return names


def written_as_times() -> set[str]:
    """perf/{phase}_time of the trainer's clock."""
    calls = [n for n in ast.walk(parse("training/trainer.py")) if isinstance(n, ast.Call) and ast.unparse(n.func) == "clock"]
    return {f"perf/{call.args[0].value}_time" for call in calls}


def test_the_page_lists_every_metric_once_and_no_other():
    on_page = listed()
    written = written_by_name() | written_as_columns() | written_of_samples() | written_of_steps() | written_as_times()
    assert sorted({name for name in on_page if on_page.count(name) > 1}) == []
    assert {"missing": sorted(written - set(on_page)), "unknown": sorted(set(on_page) - written)} == {
        "missing": [],
        "unknown": [],
    }


def test_the_reader_sees_what_is_written():
    """Names found by hand in the sources, one of each way in which they are put together."""
    assert "perf/step_time" in written_by_name() and "rollout/dynamic_filter/drop_{}" in written_by_name()
    assert {"rollout/correct_response_len/max", "eval/{}/num_failed", "rollout/zero_std/count_{}"} <= written_of_samples()
    assert {"train/pg_clipfrac", "train/lr-pg_{}", "train/grad_norm", "train/mtp_loss", "train/step"} <= written_of_steps()
    assert written_as_times() == {
        "perf/log_probs_time",
        "perf/ref_log_probs_time",
        "perf/teacher_log_probs_time",
        "perf/actor_train_time",
        "perf/values_time",
        "perf/critic_train_time",
    }


def test_other_pages_name_metrics_that_exist():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        named = re.findall(r"`((?:rollout|train|perf|eval|passrate|multi_turn)/\w[\w@/*-]*)`", page.read_text())
        assert not_listed(name.replace("/*", "/mean") for name in named) == [], page.name
