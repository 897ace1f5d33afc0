"""Plans for a cluster: each, pasted behind the run's flags, passes the rehearsal; where nothing fits, it is said what would."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from slime.rehearse.advice.plan import HEADROOM, Planned, make_plan
from slime.rehearse.advice.variants import Bench
from slime.rehearse.command import main
from slime.rehearse.model.rates import GPUS, rates_of
from slime.rehearse.options import Options
from slime.rehearse.report.text import as_text
from slime.rehearse.result import Rehearsal, rehearse
from tests.rehearse.recipes import ROOT, Recipe, one_node

VERSION = "0.5.23"


def options(gpu: str, env: dict[str, str] | None) -> Options:
    told = {"build_ranks": False, "weight_map": False, "curves": False, "engine_version": VERSION}
    return Options(gpu=gpu, gpu_memory_gb=GPUS[gpu].memory_gb, env=env, **told)


def planned(argv: list[str], nodes: int, gpu: str, folder: Path, env: dict[str, str] | None = None) -> tuple[Planned, Bench]:
    bench = Bench(tuple(argv), options(gpu, env), rates_of(gpu), VERSION, folder)
    return make_plan(bench, nodes=nodes, gpu=gpu, judge=lambda words: True), bench


def argv_of(model: str, flagship: Recipe, folder: Path) -> tuple[list[str], dict[str, str] | None]:
    if model == "GLM-5.2":
        return flagship.written(folder), flagship.env
    script, tp, ep = {"Qwen3-4B": ("qwen3-4B", "2", "1"), "DeepSeek-V3": ("deepseek-v3", "8", "8")}[model]
    return one_node(script, model, tp=tp, ep=ep), None


def holds(done: Rehearsal) -> None:
    """Launchable, or not proven for the one reason that config.json is not here."""
    assert not done.findings.of("violation"), [finding.line() for finding in done.findings.of("violation")]
    deciding = [finding for finding in done.findings.of("unchecked") if finding.decides]
    assert all(finding.area == "files" and "config.json is not on this machine" in finding.what for finding in deciding)


CLUSTERS = [
    ("GLM-5.2", 8, "h200"), ("GLM-5.2", 16, "h100"), ("GLM-5.2", 16, "h200"), ("GLM-5.2", 32, "h100"), ("GLM-5.2", 32, "h200"),
    ("Qwen3-4B", 4, "h100"), ("Qwen3-4B", 8, "h200"), ("Qwen3-4B", 16, "h100"), ("Qwen3-4B", 32, "h200"),
    ("DeepSeek-V3", 8, "h200"), ("DeepSeek-V3", 16, "h100"), ("DeepSeek-V3", 32, "h200"), ("DeepSeek-V3", 32, "h100"),
]  # fmt: skip


@pytest.mark.parametrize("model, nodes, gpu", CLUSTERS)
def test_every_plan_passes_the_rehearsal(model: str, nodes: int, gpu: str, flagship: Recipe, tmp_path: Path) -> None:
    argv, env = argv_of(model, flagship, tmp_path)
    found, bench = planned(argv, nodes, gpu, tmp_path, env)
    assert found.plans, found.nearest
    for plan in found.plans:
        done = rehearse(bench.words(plan.variant), options(gpu, env))
        holds(done)
        grid = done.reading.grid
        assert grid == plan.layout.grid
        assert grid.tp * grid.pp * grid.cp * grid.dp == nodes * 8 == grid.etp * grid.ep * grid.pp * grid.edp
        assert sum(group.engines * group.gpus for group in plan.fleet.groups) == nodes * 8
        assert plan.peak_gb < GPUS[gpu].memory_gb and done.cost.per_million == pytest.approx(plan.cost.per_million)
    own = [plan.cost.per_million for plan in found.plans if plan.prompts == found.plans[0].prompts]
    assert own == sorted(own)


def test_a_larger_batch_is_planned_too_and_is_cheaper(flagship: Recipe, tmp_path: Path) -> None:
    found, _ = planned(flagship.written(tmp_path), 16, "h200", tmp_path, flagship.env)
    small, large = (plan for plan in (found.plans[0], found.plans[-1]))
    assert small.prompts == 8 and large.prompts * 8 <= large.assessment.engines.held
    assert large.cost.per_million < small.cost.per_million / 5
    assert small.peak_gb < 141 * (1 - HEADROOM)


def test_where_nothing_fits_it_is_said_what_would(flagship: Recipe, tmp_path: Path) -> None:
    """4 nodes of 80 GB are 2.56 TB; bf16 weights and fp32 gradients of 743 billion parameters alone are 4.46 TB."""
    assert 4 * 8 * 80e9 < 743_377_000_704 * 6
    found, bench = planned(flagship.written(tmp_path), 4, "h100", tmp_path, flagship.env)
    assert not found.plans and "weights and gradients alone take" in found.nearest
    [more, larger] = found.would_fit
    assert more.startswith("16 nodes of h100: TP ") and larger.startswith("8 nodes of h200: TP ")
    assert planned(flagship.written(tmp_path), 16, "h100", tmp_path, flagship.env)[0].plans
    assert not planned(flagship.written(tmp_path), 8, "h100", tmp_path, flagship.env)[0].plans


def test_the_printed_lines_pass_when_they_are_pasted(
    flagship: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Words and YAML are taken from the text that a person reads."""
    argv, report = flagship.written(tmp_path), tmp_path / "plan.json"
    told = ["--runtime-env", json.dumps(flagship.env), "--engine-version", VERSION, "--gpu", "h200"]
    assert main(["--plan", "--nodes", "16", "--json", str(report), *told, *argv]) == 0
    plans = capsys.readouterr().out.split("\n-- plan ")[1:]
    assert len(plans) == len(json.loads(report.read_text())["plans"]) >= 2
    for text in plans:
        lines = text.splitlines()
        words = shlex.split(next(line for line in lines if line.startswith("  --actor-num-nodes ")))
        head = f"with {words[-1]}, by a full path that the first node sees:"
        if head in lines:
            yaml = [line[2:] for line in lines[lines.index(head) + 1 :] if line.startswith("  ")]
            (tmp_path / words[-1]).write_text("\n".join(yaml) + "\n")
        words[-1] = str(tmp_path / words[-1])
        done = rehearse([*argv, *words], options("h200", flagship.env))
        assert done.findings.verdict == "launchable", done.findings.of("violation")


def test_a_launcher_plans_for_other_nodes(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "scripts/run-qwen3-4B.sh"), "--rehearse", "--plan", "--nodes", "4", "--gpu", "h200"]
    env = {key: value for key, value in os.environ.items() if key not in ("HOSTFILE", "BASE_DIR", "MASTER_ADDR")}
    done = subprocess.run(command, env={**env, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "plans for 4 nodes of h200 (141 GB), each of which passes the rehearsal" in done.stdout
    assert "\n  --actor-num-nodes 4 " in done.stdout


def test_engines_may_have_gpus_of_their_own(tmp_path: Path) -> None:
    argv = [word for word in one_node("qwen3-4B", "Qwen3-4B", tp="2", ep="1") if word != "--colocate"]
    found, bench = planned([*argv, "--rollout-num-gpus", "4"], 4, "h100", tmp_path)
    for plan in found.plans:
        done = rehearse(bench.words(plan.variant), options("h100", None))
        holds(done)
        cluster = done.reading.config.cluster
        assert cluster.actor_num_nodes * 8 + cluster.rollout_num_gpus == 32 and not cluster.colocate
    assert found.plans


def test_one_step_ahead_takes_the_longer_of_generation_and_training_and_every_second_rollout_a_sync() -> None:
    argv = [word for word in one_node("qwen3-4B", "Qwen3-4B", tp="2", ep="1") if word != "--colocate"]
    apart = [*argv, "--rollout-num-gpus", "4"]
    in_turn = rehearse(apart, options("h100", None)).cost
    done = rehearse([*apart, "--schedule", "one-step-ahead", "--update-weights-interval", "2"], options("h100", None))
    seconds = {phase.name: phase.seconds for phase in in_turn.phases}
    generation, sync = seconds.pop("prefill") + seconds.pop("rollout"), seconds.pop("weight sync")
    assert in_turn.seconds == pytest.approx(generation + sum(seconds.values()) + sync)
    assert generation > 0 and sum(seconds.values()) > 0
    assert done.cost.seconds == pytest.approx(max(generation, sum(seconds.values())) + sync / 2)
    assert "samples are trained at most 1 weight version after the one that wrote them" in as_text(done)


@pytest.mark.parametrize(
    "own, message",
    [
        (["--plan", "--gpu", "a100"], "--gpu a100 is not known; it is one of h100"),
        (["--plan", "--nodes", "100000"], "--nodes may be 1,024 at most, got 100000"),
        (["--nodes", "4"], "--nodes is of --plan"),
        (["--plan", "--html", "plan.html"], "--html is not of --plan"),
        (["--plan", "--nodes", "none"], "--nodes wants a number"),
    ],
)
def test_wrong_words_are_told(own: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    own = [str(tmp_path / word) if word == "plan.html" else word for word in own]
    assert main([*own, *one_node("qwen3-4B", "Qwen3-4B", tp="2", ep="1")]) == 2
    assert message in capsys.readouterr().err


def test_flags_that_are_wrong_everywhere_are_not_the_clusters_fault(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--plan", "--nodes", "2", *one_node("qwen3-4B", "Qwen3-4B", tp="2", ep="1"), "--num-rollouts", "3"]) == 1
    assert capsys.readouterr().out.startswith("NO PLAN: the flags are refused on every cluster: unknown flag --num-rollouts")


def test_a_plan_without_the_model_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--plan", "--nodes", "4", "--num-rollout", "1"]) == 2
    assert "--plan needs the model" in capsys.readouterr().err


def test_the_gpu_of_a_rehearsal_sets_memory_and_rates(flagship: Recipe, tmp_path: Path) -> None:
    told = replace(options("h200", flagship.env), gpu_memory_gb=141)
    done = rehearse(flagship.written(tmp_path), told)
    assert done.rates.hbm_gb_per_s == 4800 and done.findings.launchable
