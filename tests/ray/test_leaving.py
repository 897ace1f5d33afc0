"""Asked to leave by a signal, a time limit or an interval: when, what is saved, and with which status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from slime.config.loop import LoopConfig
from slime.config.upkeep import UpkeepConfig
from slime.ray.leaving import Leaving
from slime.ray.run import Run
from slime.train import train

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("rules", "minutes", "left"),
    [
        ({}, [0, 500, 1000, 1500], {}),
        ({"exit_interval": 2}, [0, 0, 0, 0], {2: "--exit-interval 2"}),  # the fourth is the last one
        ({"exit_duration_in_mins": 90.0}, [89, 90, 91, 92], {3: "--exit-duration-in-mins 90, after 91.0"}),
    ],
)
def test_a_run_leaves_after_the_rollout_that_its_rules_name(rules, minutes, left):
    now = [7.0]
    leaving = Leaving(UpkeepConfig(**rules), clock=lambda: now[0])
    found = {}
    for rollout_id, after in enumerate(minutes):
        now[0] = 7.0 + 60 * after
        found[rollout_id + 1] = leaving.why_after(rollout_id, is_last=rollout_id == 3)
    assert {rollout: why for rollout, why in found.items() if why} == left


# A driver with the phases of one: "NAME" is printed when it is there, and the test sends its signals then.
DRIVER = """
import logging, sys, time
from slime.config.upkeep import UpkeepConfig
from slime.ray import leaving as module
from slime.ray.leaving import Leaving

logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
module._LEAVE_SECONDS = 1.0
leaving = Leaving(UpkeepConfig(save_on_signal={saves}, save_on_signal_seconds={seconds}))
leaving.listen()
leaving.hold()

def stay(name, seconds):
    print(name, flush=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.05)

try:
    with leaving.interruptible():
        stay("generating", {generating})
    stay("training", {training})
    print("after training:", leaving.why_after(3, is_last=False), flush=True)
    with leaving.interruptible():
        stay("generating again", 0)
except KeyboardInterrupt as name:
    print("interrupted by", name, flush=True)
"""


def driven(at: str, *signals: int, saves: bool = True, seconds: int = 60, generating: float = 0, training: float = 0):
    code = DRIVER.format(saves=saves, seconds=seconds, generating=generating, training=training)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    said = []
    for line in process.stdout:
        said.append(line.rstrip())
        if said[-1] == at or (said[-1].startswith("SIG") and len(signals) > 1):
            process.send_signal(signals[0] if said[-1] == at else signals[1])
    return process.wait(60), said


def test_a_signal_ends_the_wait_for_engines_at_once():
    status, said = driven("generating", signal.SIGUSR1, generating=60)
    assert status == 0 and said[-1] == "interrupted by SIGUSR1" and "training" not in said
    assert said[1] == "SIGUSR1: saving at the next boundary and leaving, within 60 s; a second signal leaves at once"


def test_a_signal_lets_training_finish_and_is_heard_behind_it():
    status, said = driven("training", signal.SIGTERM, training=1)
    assert status == 0 and said[-2:] == ["after training: SIGTERM", "interrupted by SIGTERM"]


def test_a_second_signal_and_one_without_the_flag_leave_at_once():
    status, said = driven("training", signal.SIGTERM, signal.SIGTERM, training=60)
    assert status == 143 and said[-1].startswith("stopped from outside (SIGTERM again): ending engines and trainer")
    status, said = driven("training", signal.SIGTERM, saves=False, training=60)
    assert status == 143 and said[-1].startswith("stopped from outside (SIGTERM): ending engines and trainer; the last")


def test_what_is_not_saved_in_time_is_left():
    status, said = driven("training", signal.SIGTERM, seconds=1, training=60)
    assert status == 143
    assert "the run was not saved within --save-on-signal-seconds 1: it leaves with status 143" in said


# ------------------------------------------------------------------------------------------------- what is saved


class Both:
    """Engines and trainer in one. `signals`: (event, signal) sent to this process where that event happens."""

    def __init__(self, signals: dict[str, int]):
        self.events, self.signals, self.next_prompt = [], dict(signals), 0

    def note(self, event: str) -> None:
        self.events.append(event)
        if event in self.signals:
            os.kill(os.getpid(), self.signals.pop(event))

    def begin_rollout(self, rollout_id):
        return lambda: self.generate(rollout_id)

    def generate(self, rollout_id):
        self.next_prompt += 4
        self.note(f"generate {rollout_id}")
        return SimpleNamespace(total_lengths=[], trajectories=[], mask_sums=[], weight_versions=()), SimpleNamespace(metrics={})

    def train(self, batch, steps):
        self.note("train")
        return SimpleNamespace(metrics={}, per_step=[])

    def state(self, saving=None):
        return {"next": self.next_prompt, "saving": saving}

    def save(self, rollout_id, data_state):
        self.note(f"save {rollout_id} with {data_state}")

    def __getattr__(self, name):
        return lambda *args: self.note(name)


@pytest.fixture
def run_until(monkeypatch):
    """Events of a run of 6 rollouts that saves every fourth, and whether it was interrupted."""
    monkeypatch.setattr("slime.ray.in_flight.ray.get", lambda ref: ref)
    monkeypatch.setattr("slime.ray.run.plan_steps", lambda *_, **__: [])
    monkeypatch.setattr("slime.ray.run.sample_costs", lambda *_: None)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}

    def run_until(signals: dict[str, int], *, rollout_only: bool = False, **rules) -> list[str]:
        sizes = SimpleNamespace(
            data_parallel_size=1, context_parallel_size=1, virtual_pipeline_model_parallel_size=None,
            pipeline_model_parallel_size=1,
        )  # fmt: skip
        checkpoint = SimpleNamespace(save="/save", save_interval=4, async_save=False, save_hf=None)
        config = SimpleNamespace(
            debug=SimpleNamespace(
                debug_rollout_only=rollout_only, debug_train_only=False, ci_test=False, ci_save_grad_norm=None,
                ci_load_grad_norm=None,
            ),
            data=SimpleNamespace(num_rollout=6), engine=SimpleNamespace(use_fault_tolerance=False, update_weights_interval=1),
            loop=LoopConfig(), checkpoint=checkpoint,
            evaluation=SimpleNamespace(datasets=()), batch=None, parallel=sizes,
            algorithm=SimpleNamespace(calculate_per_token_loss=False),
        )  # fmt: skip
        leaving = Leaving(UpkeepConfig(**rules))
        leaving.listen()
        run = Run(config, leaving)
        both = run._rollout = run._trainers = Both(signals)
        run.start = leaving.hold
        run.sync_weights = lambda: both.note("sync")
        run.report = lambda *_, **__: None
        try:
            train(run, config)
        except KeyboardInterrupt:
            run.save_trained()
        return both.events

    yield run_until
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_preemption_while_generating_saves_the_rollout_before_with_the_prompts_of_the_broken_one(run_until):
    events = run_until({"generate 2": signal.SIGTERM}, save_on_signal=True)
    # Two rollouts took 8 prompts; the third, which broke, had taken 4 more.
    assert events[-4:] == ["generate 2", "stop", "wake", "save 1 with {'next': 8, 'saving': 1}"]


def test_a_preemption_while_training_saves_that_rollout_and_sends_no_weights(run_until):
    events = run_until({"train": signal.SIGTERM}, save_on_signal=True)
    assert events == ["generate 0", "train", "save 0 with {'next': 4, 'saving': 0}"]


def test_a_preemption_while_weights_are_sent_waits_for_them_and_saves_once(run_until):
    events = run_until({"sync": signal.SIGTERM}, save_on_signal=True)
    assert events == ["generate 0", "train", "sync", "stop", "wake", "save 0 with {'next': 4, 'saving': 0}"]
    events = run_until({"generate 4": signal.SIGTERM}, save_on_signal=True)
    assert [event for event in events if event.startswith(("save", "stop"))] == ["save 3 with {'next': 16, 'saving': 3}"]


EARLY = """
import os, signal, sys
from types import SimpleNamespace
from slime import train
from slime.config.upkeep import UpkeepConfig

class Meanwhile:
    def find_spec(self, name, *rest):
        if name == "slime.ray.run":
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Meanwhile())
train.load = lambda argv, env: SimpleNamespace(
    checkpoint=SimpleNamespace(save=None), notes=(), nothing_to_train=lambda: "", trains=False,
    upkeep=UpkeepConfig(save_on_signal={saves}),
)
train.plan_engines = lambda config: None
sys.exit(train.main([]))
"""


@pytest.mark.parametrize(
    ("saves", "status", "told"),
    [(False, 143, "stopped from outside (SIGTERM)"), (True, 0, "left before there was anything to save")],
)
def test_a_signal_that_comes_while_modules_are_imported_is_told(tmp_path, saves: bool, status: int, told: str):
    environment = os.environ | {"SLIME_RUN_DIR": str(tmp_path)}
    command = [sys.executable, "-c", EARLY.format(saves=saves)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == status and told in done.stderr, done.stderr


def test_an_interval_saves_between_the_regular_ones(run_until):
    events = run_until({}, exit_interval=3)
    assert events[-2:] == ["train", "save 2 with {'next': 12, 'saving': 2}"]
    assert run_until({}, exit_interval=3, rollout_only=True) == ["generate 0", "generate 1", "generate 2"]


@pytest.mark.slow
def test_a_signal_passes_through_a_wait_of_rays():
    code = """
import signal, sys, threading, time
import ray
from slime.config.upkeep import UpkeepConfig
from slime.ray.calls import gather
from slime.ray.leaving import Leaving

ray.init("local", num_cpus=1, num_gpus=0, include_dashboard=False, logging_level=40)
leaving = Leaving(UpkeepConfig(save_on_signal=True))
leaving.listen()
leaving.hold()

@ray.remote(num_cpus=0)
class Engines:
    def generate(self):
        time.sleep(100)
    def state(self):
        return 7

one, other = Engines.remote(), Engines.remote()
ray.get([one.state.remote(), other.state.remote()])
threading.Timer(1, signal.raise_signal, [signal.SIGTERM]).start()
try:
    with leaving.interruptible():
        gather({"rollout": one.generate.remote()}, doing="generating")
except KeyboardInterrupt:
    print("left with", ray.get(other.state.remote()), leaving.signal)
"""
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert told.stdout.splitlines()[-1:] == ["left with 7 SIGTERM"], told.stdout + told.stderr
