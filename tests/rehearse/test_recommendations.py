"""Every line that the rehearsal prints to paste passes the rehearsal that prints it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from slime.rehearse.advice.variants import Bench
from slime.rehearse.checks.layout import paste
from slime.rehearse.options import Options
from slime.rehearse.report.text import as_text
from slime.rehearse.result import Rehearsal, rehearse
from tests.rehearse.recipes import Recipe, one_node

VERSION = "0.5.23"
Edit = Callable[[Recipe], Recipe]


def behind(*words: str) -> Edit:
    return lambda recipe: replace(recipe, argv=(*recipe.argv, *words))


def model(name: str, folder: str, *, tp: str, ep: str, words: str) -> Edit:
    return lambda recipe: Recipe((*one_node(name, folder, tp=tp, ep=ep), *words.split()), {})


PASSING: dict[str, Edit] = {
    "the recipe": behind(),
    "virtual stages by list": behind(
        *"--decoder-first-pipeline-num-layers none --decoder-last-pipeline-num-layers none".split(),
        *"--pipeline-model-parallel-layout 6,4,4,4,4,4,8,8,8,4,4,4,4,4,4,4".split(),
    ),
    "virtual stages and indices that travel": behind("--num-virtual-stages-per-pipeline-rank", "2", "--dsa-send-indices"),
    "indices that travel": behind("--dsa-send-indices"),
    "two layers recomputed together": behind("--recompute-num-layers", "2"),
    "a trained draft layer": behind("--mtp-num-layers", "1", "--enable-mtp-training"),
    "no drafts in the engines": behind("--kl-coef", "0.1"),
    "Qwen3-4B in stages": model("qwen3-4B", "Qwen3-4B", tp="2", ep="1", words="--pipeline-model-parallel-size 4"),
    "Qwen3-30B in virtual stages": model(
        "qwen3-30B-A3B",
        "Qwen3-30B-A3B",
        tp="2",
        ep="2",
        words="--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 3",
    ),
    "DeepSeek-V3 on 32 nodes": model(
        "deepseek-v3",
        "DeepSeek-V3",
        tp="8",
        ep="8",
        words="--actor-num-nodes 32 --pipeline-model-parallel-size 16 --rollout-num-gpus-per-engine 64 --sglang-ep-size 64 "
        "--pipeline-model-parallel-layout 3,4,4,4,4,4,4,4,4,4,4,4,4,4,4,2 --sglang-enable-dp-attention --sglang-dp-size 64 "
        "--sglang-moe-dense-tp-size 1",
    ),
}

WITH_CURVES = ("virtual stages by list", "Qwen3-30B in virtual stages", "DeepSeek-V3 on 32 nodes")
"""Every point of the recipe's own curves is held by test_advice.py."""

REFUSED: dict[str, Edit] = {
    "stages that start wrong": behind(
        "--decoder-first-pipeline-num-layers", "15", "--decoder-last-pipeline-num-layers", "15"
    ),
    "virtual stages that start wrong": behind("--num-virtual-stages-per-pipeline-rank", "2"),
    "an engine that takes all": behind("--sglang-mem-fraction-static", "0.95"),
    "the optimizer on the GPU": behind("--optimizer-offload-fraction", "0.1"),
    "no recomputation": behind(
        *"--recompute-granularity none --recompute-method none --recompute-num-layers none".split()
    ),
    "strides that do not divide": behind("--recompute-num-layers", "4"),
    "half a step": behind("--global-batch-size", "48"),
    "half the nodes": behind("--actor-num-nodes", "16"),
}  # fmt: skip


def rehearsed(recipe: Recipe, argv: list[str], **told: object) -> Rehearsal:
    return rehearse(argv, Options(env=recipe.env or None, build_ranks=False, weight_map=False, engine_version=VERSION, **told))


def is_sound(done: Rehearsal) -> None:
    assert not done.findings.of("violation"), [finding.line() for finding in done.findings.of("violation")]


def splits_of(done: Rehearsal) -> list[str]:
    config, balance = done.reading.config, done.balance
    words = [paste(config, split, as_list=False) for split in balance.first_last]
    return words + ([paste(config, balance.best, as_list=True)] if balance.best is not None else [])


@pytest.mark.parametrize("name", PASSING)
def test_what_is_recommended_to_a_run_that_passes(name: str, flagship: Recipe, tmp_path: Path) -> None:
    recipe = PASSING[name](flagship)
    argv = recipe.written(tmp_path)
    done = rehearsed(recipe, argv, curves=name in WITH_CURVES)
    is_sound(done)
    text = as_text(done)
    splits = splits_of(done)
    for words in splits:
        assert words in text
        is_sound(rehearsed(recipe, [*argv, *words.split()], curves=False))
    bench = Bench(tuple(argv), done.options, done.rates, VERSION, tmp_path)
    for curve in done.curves:
        assert " ".join(curve.knee.variant.flags) in text
        is_sound(rehearsed(recipe, bench.words(curve.knee.variant), curves=False))
    assert splits and (len(done.curves) >= 2 or name not in WITH_CURVES)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_recommended_to_a_run_that_is_refused(name: str, flagship: Recipe, tmp_path: Path) -> None:
    recipe = REFUSED[name](flagship)
    argv = recipe.written(tmp_path)
    done = rehearsed(recipe, argv)
    assert done.findings.verdict == "not launchable"
    bench = Bench(tuple(argv), done.options, done.rates, VERSION, tmp_path)
    for remedy in done.remedies:
        assert " ".join(remedy.variant.flags) in as_text(done)
        is_sound(rehearsed(recipe, bench.words(remedy.variant), curves=False))
    if name == "half the nodes":
        assert not done.remedies and "--plan searches" in as_text(done)
    else:
        assert done.remedies


@pytest.mark.parametrize(
    "tokens, graph, running",
    [("32", "12", "768"), ("64", "32", "768"), ("64", "8", "4096"), ("128", "100", "768"), ("3", "12", "768")],
)
def test_each_way_out_of_a_small_dispatch_buffer_holds(
    tokens: str, graph: str, running: str, flagship: Recipe, tmp_path: Path
) -> None:
    """The variable alone, or graph batch and requests together."""
    recipe = flagship.with_env(SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK=tokens)
    recipe = recipe.with_yaml("cuda_graph_max_bs: 12", f"cuda_graph_max_bs: {graph}")
    recipe = recipe.with_yaml("max_running_requests: 768", f"max_running_requests: {running}")
    [refused] = rehearsed(recipe, recipe.written(tmp_path), quick=True).findings.of("violation")
    ways = refused.fix.split(", or ")
    for way in ways:
        if larger := re.fullmatch(r"set (\w+)=(\d+)", way):
            mended = recipe.with_env(**{larger[1]: larger[2]})
        else:
            less = re.fullmatch(r"lower cuda_graph_max_bs to (\d+) and max_running_requests to (\d+)", way)
            mended = recipe.with_yaml(f"cuda_graph_max_bs: {graph}", f"cuda_graph_max_bs: {less[1]}")
            mended = mended.with_yaml(f"max_running_requests: {running}", f"max_running_requests: {less[2]}")
        is_sound(rehearsed(mended, mended.written(tmp_path), curves=False))
    assert len(ways) == (1 if tokens == "3" else 2)
