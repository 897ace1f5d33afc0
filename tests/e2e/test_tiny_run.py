"""The launcher of the tiny GLM-5.2 as a user runs it: a Ray job, two trainer ranks, a prefill and a decode engine, a router."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import ClassVar

import audits
import pytest
import torch
from metrics_page import not_listed

from tools.drills.exact import tensors

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
HOOKS = Path(__file__).with_name("hooks")
ROLLOUT_LINE = re.compile(r"rollout +(\d+)/(\d+) \| reward +(-?[\d.]+) .*\| gap ([\d.]+) ")


class Launch:
    """One run of the launcher, its output read while it runs."""

    begun: ClassVar[list["Launch"]] = []

    def __init__(self, base: Path, *flags: str, **environment: str):
        passed = " ".join(name for name in ("RAY_worker_niceness", "RECORD_READS") if name in os.environ)
        environment = os.environ | {"BASE_DIR": str(base), "SFT_STEPS": "3", "PASS_ENV": passed} | environment
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            ["bash", str(ROOT / "scripts" / "run-glm5.2-tiny.sh"), *flags],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        Launch.begun.append(self)

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait(self, timeout: float = 1800.0) -> int:
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)
            raise AssertionError(f"the run did not end within {timeout:.0f} s:\n{self.text[-6000:]}") from None
        self._reader.join(10)
        return status

    def wait_for(self, pattern: str, timeout: float = 1800.0) -> re.Match:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found = re.search(pattern, self.text)
            if found:
                return found
            if self.process.poll() is not None:
                break
            time.sleep(0.2)
        raise AssertionError(f"no line matched {pattern!r}:\n{self.text[-6000:]}")

    def wait_for_file(self, path: Path, timeout: float = 1800.0) -> None:
        deadline = time.monotonic() + timeout
        while not path.exists():
            assert self.process.poll() is None and time.monotonic() < deadline, f"no {path}:\n{self.text[-6000:]}"
            time.sleep(0.02)

    def rollouts(self) -> dict[int, tuple[float, float]]:
        """rollout -> (reward, train/rollout log-prob gap)."""
        return {int(m[1]): (float(m[3]), float(m[4])) for m in ROLLOUT_LINE.finditer(self.text)}


def _processes_mentioning(text: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if text in command:
                found.append(f"{entry.name} {command[:200]}")
    return found


@pytest.fixture(autouse=True)
def nothing_runs_on():
    """A run whose test has failed would hold the folder that the next test works in."""
    yield
    for run in Launch.begun:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGTERM)
            run.process.wait(60)
    Launch.begun.clear()


SMALL = ("--rollout-batch-size", "4", "--n-samples-per-prompt", "4", "--n-samples-per-eval-prompt", "1")


def _dumped_prompts(folder: Path, rollout_id: int) -> list[str]:
    samples = torch.load(folder / f"{rollout_id}.pt", weights_only=False)["samples"]
    return [sample["prompt"] for sample in samples]


@pytest.mark.usefixtures("recorded_run")
def test_the_launcher_trains_saves_evaluates_outlives_an_engine_and_stops_only_what_it_started(base):
    dumps = ("--save-debug-rollout-data", str(base / "dumps" / "{rollout_id}.pt"))
    flags = ("--check-weight-update-equal", "--num-rollout", "2", "--save-interval", "1", "--eval-interval", "2")
    rehearsal = base / "rehearsal.json"
    _rehearse(base, rehearsal, *flags)
    run = Launch(base, *SMALL, *dumps, *flags, "--rehearsed", str(rehearsal), "--use-fault-tolerance")
    decode = int(run.wait_for(r"default-decode-1: ready at .* \(pid (\d+),")[1])
    prefill = int(run.wait_for(r"default-prefill-0: ready at .* \(pid (\d+),")[1])
    # Written when the first evaluation is over: the engines die while the first rollout is generated. What the run prints comes
    # seconds later, perhaps while weights are sent.
    run.wait_for_file(base / "dumps" / "eval_-1.pt")
    # Of one the server dies, of the other the actor that started it, as when Ray's memory monitor chooses it.
    os.kill(int(Path(f"/proc/{prefill}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)
    os.killpg(decode, signal.SIGKILL)
    assert run.wait() == 0, run.text[-6000:]
    assert "started again: default-prefill-0, default-decode-1" in run.text, run.text[-6000:]
    lost = r"engine default-prefill-0 cannot be asked: its actor on [\d.]+ was killed by signal 9 \(SIGKILL\)"
    assert re.search(lost, run.text), run.text[-6000:]
    assert "engine default-decode-1 was killed by signal 9 (SIGKILL)" in run.text
    assert "Unhandled error" not in run.text
    assert "the weight stream is the rehearsed one" in run.text
    rollouts = run.rollouts()
    assert sorted(rollouts) == [1, 2]
    # The trainer computes in float32, the engine in float32 with weights rounded to FP8: 3 mantissa bits move a log-prob by
    # some hundredths, a wrong model by several units.
    assert all(gap < 0.25 for _, gap in rollouts.values()), rollouts
    assert len(re.findall(r"evaluation .* arithmetic \d", run.text)) == 2, "before and after training"
    assert (base / "GLM-5.2-tiny_slime" / "latest_checkpointed_iteration.txt").read_text().strip() == "1"
    for engine in ("default-prefill-0", "default-decode-1"):
        # v1 at the start, then one for each rollout, and one more unless the dead engine was missed at a hand-over.
        assert re.search(rf"weights v[34]: (\d+) of \1 tensors read back equal from {engine}", run.text), engine
    assert list((base / "run" / "tensorboard" / "grpo").glob("events.out.tfevents.*"))
    assert _positions(base, "eval/arithmetic") == [0, 2] and _positions(base, "rollout/raw_reward") == [1, 2]
    assert _positions(base, "train/loss") == [1, 2, 3, 4], "two steps a rollout"
    lines = map(json.loads, (base / "run" / "metrics.jsonl").read_text().splitlines())
    assert not_listed({name for line in lines for name in line} - {"rollout", "train_step", "time"}) == []
    assert re.search(r"to continue from the newest checkpoint.*run-glm5.2-tiny.sh", run.text)
    # What is for files stays in files, and Ray's folder under /tmp goes after a run that ended well.
    assert [
        line for line in run.lines if re.search(r"UserWarning|cli\.py|job_manager|\] config: |is called |pid=", line)
    ] == [], run.text[-9000:]
    assert "config: " in (base / "run" / "driver.log").read_text() and (base / "run" / "console.log").is_file()
    assert not Path(re.search(r"logs (/tmp/slime-ray-\w+)", run.text)[1]).exists()
    assert _processes_mentioning(str(base)) == []


def test_the_rehearsal_predicted_the_memory_of_the_run(base):
    # Needs the run of the test above, whose ranks measured their peaks.
    report = base / "measured.json"
    _rehearse(base, report, "--measured", str(base / "run" / "memory.json"))
    assert (base / "run" / "memory.json").is_file() and (base / "run" / "tensorboard").is_dir(), "nothing is taken away"
    peaks = json.loads(report.read_text())["memory"]["measured"]["peaks"]
    assert {(row["stage"], row["phase"]) for row in peaks} >= {(s, p) for s in (0, 1) for p in ("load", "log-probs", "train")}
    for stage in (0, 1):
        rows = [row for row in peaks if row["stage"] == stage]
        predicted, measured = (max(row[kind] for row in rows) for kind in ("predicted", "measured"))
        assert abs(predicted / measured - 1) < 0.10, rows
        assert abs(next(row["error"] for row in rows if row["phase"] == "train")) < 0.10, rows


def _positions(base: Path, name: str) -> list[int]:
    """Where metrics.jsonl has that figure: rollouts or steps done."""
    lines = map(json.loads, (base / "run" / "metrics.jsonl").read_text().splitlines())
    return [line.get("rollout", line.get("train_step")) for line in lines if name in line]


def _rehearse(base: Path, report: Path, *flags: str) -> None:
    run = Launch(base, *SMALL, *flags, "--rehearse", "--no-ranks", "--json", str(report))
    assert run.wait() == 0, run.text[-6000:]


def test_a_second_run_resumes_with_the_next_prompts_and_nothing_open_and_a_dead_engine_ends_it_with_its_name(base):
    # Needs the checkpoint and the dumps of the test above. The engines serve float32 weights: nothing is rounded on the way.
    float32 = base / "GLM-5.2-tiny-float32"
    shutil.copytree(base / "GLM-5.2-tiny", float32)
    config = json.loads((float32 / "config.json").read_text())
    config["dtype"] = "float32"
    (float32 / "config.json").write_text(json.dumps(config))
    flags = ("--hf-checkpoint", str(float32), "--save-debug-rollout-data", str(base / "dumps" / "{rollout_id}.pt"))
    tensorboard = base / "run" / "tensorboard"
    shutil.rmtree(tensorboard)
    tensorboard.write_text("a file where the folder was: metrics end no run")
    passed = {"OF_THE_JUDGE_API_KEY": secrets.token_hex(16)}
    names = f"RAY_worker_niceness {' '.join(passed)}"
    run = Launch(base, *SMALL, *flags, "--num-rollout", "500", "--save-interval", "1000", PASS_ENV=names, **passed)
    run.wait_for(r"rollout +3/500 ")
    _check_the_doors(base, passed)
    pid = int(run.wait_for(r"default-decode-1: ready at .* \(pid (\d+),")[1])
    os.killpg(pid, signal.SIGKILL)
    assert run.wait() != 0
    rollouts = run.rollouts()
    assert min(rollouts) == 3, "rollouts 1 and 2 are in the checkpoint"
    for name, at_least in (("rollout/raw_reward", 3), ("train/loss", 6)):
        positions = _positions(base, name)
        assert positions == list(range(1, max(at_least, len(positions)) + 1)), "metrics count on from the checkpoint"
    assert len(re.findall(r"tensorboard.* cannot be written \(\w+Error: ", run.text)) == 1, run.text[-6000:]
    assert rollouts[3][1] < 1e-3, "float32 on both sides: the trainer and the engines are the same function"
    assert "default-decode-1 was killed by signal 9 (SIGKILL)" in run.text, run.text[-6000:]
    assert "run the same command again to resume" in run.text
    assert _processes_mentioning(str(base)) == []

    lines = (base / "arithmetic" / "train.jsonl").read_text().splitlines()
    order = list(range(len(lines)))
    used = [prompt for rollout_id in range(3) for prompt in _dumped_prompts(base / "dumps", rollout_id)]
    assert len(used) == 3 * 4 * 4
    # Three rollouts took 12 different rows of the shuffled file, each 4 times, in one pass.
    rows = [used[4 * group] for group in range(12)]
    assert [used[4 * group + member] for group in range(12) for member in range(4)] == [row for row in rows for _ in range(4)]
    import random

    random.Random(42).shuffle(order)
    expected = [json.loads(lines[row])["prompt"][0]["content"] for row in order[:12]]
    assert [question for row, question in zip(rows, expected, strict=True) if question not in row] == []


def _check_the_doors(base: Path, passed: dict[str, str]) -> None:
    """Every listener of every process, asked as another user; every place where a secret could be read."""
    found = audits.audited(base, passed=passed)
    audits.check(found, passed=passed)
    who = {row["who"] for row in found["rows"]}
    engines = {"slime.engine.serve", "sglang::router", "sglang::scheduler"}
    assert who >= engines | {"gcs_server", "raylet", "dashboard.py", "slime.train", "ray::TrainActor", "ray::EngineActor"}, who
    # Of Ray, and of nobody else, something listens beyond loopback where a run has one node.
    beyond = {row["who"] for row in found["rows"] if row["kind"] != "unix" and not row["place"].startswith("127.")}
    assert not beyond & engines, beyond


INIT_HOOK = """
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state as grid


def note(args):
    stage = f"stage {grid.get_pipeline_model_parallel_rank()} of {grid.get_pipeline_model_parallel_world_size()}"
    (Path(args.save).parent / f"init-{dist.get_rank()}").write_text(stage)
"""


def test_a_preempted_run_on_replayed_rollouts_is_resumed_and_equals_the_straight_one_to_the_bit(base, tmp_path):
    # Needs the dumps of the first test.
    replay = (
        "--load-debug-rollout-data",
        str(base / "dumps" / "{rollout_id}.pt"),
        "--eval-interval",
        "1000",
        "--save-interval",
        "1",
    )

    (tmp_path / "init_hook.py").write_text(INIT_HOOK)

    def launch(name: str, *flags: str) -> Launch:
        folder = str(tmp_path / name)
        files = ("--load", folder, "--save", folder, "--num-rollout", "2")
        return Launch(base, *SMALL, *replay, *files, *flags, PYTHONPATH=f"{tmp_path}:{HOOKS}")

    def train(name: str, *flags: str) -> None:
        run = launch(name, *flags)
        assert run.wait() == 0, run.text[-6000:]

    train("whole", "--custom-megatron-init-path", "init_hook.note")
    assert [(tmp_path / f"init-{rank}").read_text() for rank in range(2)] == ["stage 0 of 2", "stage 1 of 2"]
    signals = ("--async-save", "--save-on-signal", "--save-interval", "1000")
    run = launch("parts", *signals, "--custom-megatron-before-train-step-hook-path", "step_hook.wait")
    run.wait_for_file(tmp_path / "training")
    run.process.send_signal(signal.SIGTERM)
    run.wait_for("SIGTERM: saving at the next boundary and leaving, within 600 s")
    (tmp_path / "go").touch()
    assert run.wait() == 0, run.text[-6000:]
    assert "left early (SIGTERM): the same command goes on from there" in run.text, run.text[-6000:]
    assert re.search(r"to continue from the newest checkpoint: .*--num-rollout 2 ", run.text), run.text[-6000:]
    assert (tmp_path / "parts" / "latest_checkpointed_iteration.txt").read_text().strip() == "0"
    train("parts", "--async-save")
    whole, parts = (tensors(tmp_path / name / "iter_0000001") for name in ("whole", "parts"))
    assert set(whole) == set(parts) and any("exp_avg" in name for name in whole)
    different = [name for name, tensor in whole.items() if not torch.equal(tensor, parts[name])]
    assert different == []
