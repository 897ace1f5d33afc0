"""The launcher of the tiny GLM-5.2, as a user runs it: real Ray job, two trainer ranks, a prefill and a decode engine, router."""

import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ROLLOUT_LINE = re.compile(r"rollout +(\d+)/(\d+) \| reward +(-?[\d.]+) .*\| gap ([\d.]+) ")


class Launch:
    """One run of the launcher, its output read while it runs."""

    def __init__(self, base: Path, *flags: str):
        environment = os.environ | {"BASE_DIR": str(base), "SFT_STEPS": "3", "RAY_DEDUP_LOGS": "0"}
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

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait(self, timeout: float = 600.0) -> int:
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)
            raise AssertionError(f"the run did not end within {timeout:.0f} s:\n{self.text[-6000:]}") from None
        self._reader.join(10)
        return status

    def wait_for(self, pattern: str, timeout: float = 400.0) -> re.Match:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found = re.search(pattern, self.text)
            if found:
                return found
            if self.process.poll() is not None:
                break
            time.sleep(0.2)
        raise AssertionError(f"no line matched {pattern!r}:\n{self.text[-6000:]}")

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


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tiny")


SMALL = ("--rollout-batch-size", "4", "--n-samples-per-prompt", "4", "--global-batch-size", "16", "--n-samples-per-eval-prompt", "1")


def test_the_launcher_trains_saves_evaluates_and_stops_only_what_it_started(base):
    run = Launch(base, *SMALL, "--num-rollout", "2", "--save-interval", "1", "--eval-interval", "2")
    assert run.wait() == 0, run.text[-6000:]
    rollouts = run.rollouts()
    assert sorted(rollouts) == [1, 2]
    # The trainer computes in float32, the engine in float32 with weights rounded to FP8: 3 mantissa bits move a log-prob by
    # some hundredths, a wrong model by several units.
    assert all(gap < 0.25 for _, gap in rollouts.values()), rollouts
    assert len(re.findall(r"evaluation .* arithmetic \d", run.text)) == 2, "before and after training"
    assert (base / "GLM-5.2-tiny_slime" / "latest_checkpointed_iteration.txt").read_text().strip() == "1"
    assert list((base / "run" / "tensorboard" / "grpo").glob("events.out.tfevents.*"))
    assert re.search(r"to continue from the newest checkpoint.*run-glm5.2-tiny.sh", run.text)
    assert _processes_mentioning(str(base)) == []


def test_a_second_run_resumes_and_a_dead_engine_ends_it_with_its_name(base):
    # Needs the checkpoint of the test above.
    run = Launch(base, *SMALL, "--num-rollout", "500", "--save-interval", "1000")
    run.wait_for(r"rollout +3/500 ")
    assert min(run.rollouts()) == 3, "rollouts 1 and 2 are in the checkpoint"
    pid = int(run.wait_for(r"default-decode-1: ready at .* \(pid (\d+),")[1])
    os.killpg(pid, signal.SIGKILL)
    assert run.wait(timeout=200) != 0
    assert "default-decode-1 was killed by signal 9 (SIGKILL)" in run.text, run.text[-6000:]
    assert "run the same command again to resume" in re.sub(r"\s+", " ", run.text)
    assert _processes_mentioning(str(base)) == []
