"""When a server dies in a rollout: who is started again, which weights it gets, which prompts come next."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from slime.config.loop import LoopConfig
from slime.engine.client import EngineError, EngineGone
from slime.ray.engine_fleet import EngineFleet
from slime.ray.engine_nodes import Death
from slime.ray.health import HealthWatch, Strikes
from slime.ray.run import Run


class Side:
    """Engines and prompts. Each entry of `attempts` is one generation: the servers that die in it, and whether it breaks."""

    def __init__(self, attempts: list[tuple[list[str], bool]]):
        self.attempts, self.events, self.next_prompt, self.dead, self.starts = list(attempts), [], 10, [], 1

    def generate(self, rollout_id):
        dying, breaks = self.attempts.pop(0)
        self.dead = dying
        taken, self.next_prompt = self.next_prompt, self.next_prompt + 5
        self.events.append(f"generate from {taken}")
        if breaks:
            raise RuntimeError("8 of 8 groups failed")
        return taken, SimpleNamespace(metrics={})

    def begin_rollout(self, rollout_id):
        return lambda: self.generate(rollout_id)

    def obituaries(self):
        return [f"{label} was killed" for label in self.dead]

    def recover(self):
        self.dead, started = [], self.dead
        self.starts += 1
        return started

    def destinations(self, trainer_slots):
        return f"engines of start {self.starts}, {trainer_slots}"

    def state(self, saving=None):
        return {"next": self.next_prompt}

    def restore(self, state):
        self.events.append(f"back to {state['next']}")
        self.next_prompt = state["next"]


@pytest.fixture
def run_with(monkeypatch):
    monkeypatch.setattr("slime.ray.in_flight.ray.get", lambda ref: ref)

    def make(attempts, *, tolerant: bool = True, schedule: str = "sync") -> tuple[Run, Side]:
        debug = SimpleNamespace(debug_rollout_only=False, debug_train_only=False)
        data, checkpoint = SimpleNamespace(num_rollout=9), SimpleNamespace(save=None)
        engine = SimpleNamespace(use_fault_tolerance=tolerant)
        run = Run(SimpleNamespace(debug=debug, data=data, engine=engine, checkpoint=checkpoint, loop=LoopConfig(schedule)))
        side = run._rollout = Side(attempts)

        @contextmanager
        def handed(to: str):
            side.events.append(f"devices to {to}")
            yield

        run.lease = SimpleNamespace(training=lambda: handed("the trainer"), syncing=lambda: handed("the sync"))
        run.sync_weights = lambda: side.events.append("weights")
        return run, side

    return make


AGAIN = ["devices to the trainer", "devices to the sync", "weights"]


def test_a_rollout_that_a_death_broke_is_made_again_from_the_same_prompts_with_the_trainers_weights(run_with):
    run, side = run_with([(["decode-1"], True), ([], False), ([], False)])
    assert run.generate(3).batch == 10
    assert side.events == ["generate from 10", *AGAIN, "back to 10", "generate from 10"]
    assert run.generate(4).batch == 15, "and the prompts go on behind those"


def test_who_died_while_the_devices_changed_hands_is_mended_before_the_next_prompts(run_with):
    run, side = run_with([([], False)])
    side.dead = ["decode-1"]
    assert run.generate(3).batch == 10
    assert side.events == [*AGAIN, "generate from 10"]


def test_where_generation_goes_on_all_the_time_it_begins_anew_once_who_died_beside_training_is_mended(run_with):
    run, side = run_with([([], False)], schedule="fully-async")
    side.dead = ["decode-1"]
    assert run.generate(3).batch == 10
    assert side.events == [*AGAIN, "back to 10", "generate from 10"]


def test_a_rollout_that_the_other_engines_finished_stands(run_with):
    run, side = run_with([(["decode-2"], False)])
    assert run.generate(3).batch == 10
    assert side.events == ["generate from 10", *AGAIN]


def test_what_breaks_while_all_servers_live_ends_the_run(run_with):
    run, side = run_with([([], True), ([], False)])
    with pytest.raises(RuntimeError, match="8 of 8 groups failed"):
        run.generate(3)
    assert side.events == ["generate from 10"]


def test_a_server_that_dies_every_time_ends_the_run(run_with):
    run, side = run_with([(["decode-1"], True)] * 4)
    with pytest.raises(RuntimeError, match="8 of 8 groups failed"):
        run.generate(3)
    assert side.events.count("generate from 10") == 3


def test_without_the_flag_nobody_is_started_again(run_with):
    run, side = run_with([(["decode-1"], True), ([], False)], tolerant=False)
    with pytest.raises(RuntimeError, match="8 of 8 groups failed"):
        run.generate(3)
    assert side.events == ["generate from 10"]


@pytest.fixture
def sync_with(run_with, monkeypatch):
    """A run whose attempts to send weights kill the engines named, one entry each, and what each attempt raises."""

    def make(deaths: list[list[str]], **how) -> tuple[Run, Side]:
        run, side = run_with([], **how)
        del run.sync_weights
        placement = SimpleNamespace(trainer_slots="ranks on a spare")
        run._trainers = SimpleNamespace(has_failed=False, can_recover=lambda broken: False, placement=placement)
        run._config.engine.check_weight_update_equal = False
        left = list(deaths)

        def send(engines, trainers, *, version, read_back):
            side.events.append(f"send v{version}")
            side.dead = left.pop(0)
            if side.dead:
                raise RuntimeError(f"lost while weights v{version} were sent: {side.dead[0]}")
            return f"report of v{version}"

        def restart_engines() -> bool:
            side.events.append(f"start {side.recover()}")
            return True

        monkeypatch.setattr("slime.ray.run.sync_weights", send)
        monkeypatch.setattr("slime.ray.run._DYING_SECONDS", 0.0)
        run.lease.restart_engines = restart_engines
        return run, side

    return make


def test_an_engine_that_dies_while_weights_are_sent_is_started_again_and_all_get_the_same_version(sync_with):
    run, side = sync_with([["decode-1"], [], []])
    assert run.sync_weights() == "report of v1"
    now = "engines of start 2, ranks on a spare"
    assert run._trainers.destinations == now, "what was started anew has joined no group for weights"
    assert side.events == ["send v1", "start ['decode-1']", "send v1"]
    assert run.sync_weights() == "report of v2"


@pytest.mark.parametrize("why", ["every time", "without the flag", "the trainer failed too"])
def test_a_sync_that_cannot_be_made_good_ends_the_run(sync_with, why):
    run, side = sync_with([["decode-1"]] * 4, tolerant=why != "without the flag")
    run._trainers.has_failed = why == "the trainer failed too"
    with pytest.raises(RuntimeError, match="lost while weights v1 were sent: decode-1"):
        run.sync_weights()
    assert side.events.count("send v1") == (3 if why == "every time" else 1)


def test_a_sync_that_breaks_while_all_servers_live_ends_the_run(sync_with):
    run, side = sync_with([["decode-1"]])
    side.obituaries = lambda: []
    with pytest.raises(RuntimeError, match="lost while weights v1 were sent"):
        run.sync_weights()
    assert side.events == ["send v1"]


def test_a_call_to_all_engines_waits_for_all_answers_before_one_error_is_raised():
    fleet = EngineFleet.__new__(EngineFleet)
    fleet._token, answered = "token", []
    engines = [SimpleNamespace(label=name, url=f"http://127.0.0.1:{port}") for port, name in enumerate(("a", "b"), start=1)]

    async def call(client):
        if client.url.endswith(":1"):
            raise EngineGone("nobody is there")
        await asyncio.sleep(0.05)
        answered.append(client.url)

    with pytest.raises(EngineGone, match=r"^engine a, flushing its cache, after \d\.\d s: nobody is there$"):
        fleet._each(engines, call, doing="flushing its cache")
    assert answered == ["http://127.0.0.1:2"]


def test_a_call_that_is_not_answered_names_engine_phase_and_seconds_and_how_many_were_expected():
    fleet, silent = EngineFleet.__new__(EngineFleet), socket.create_server(("127.0.0.1", 0))
    fleet._token = "token"
    engines = [SimpleNamespace(label="decode-1", url=f"http://127.0.0.1:{silent.getsockname()[1]}")]
    with silent, pytest.raises(EngineError, match=r"^engine decode-1, pausing, after \d+\.\d s: POST .*: no answer within 1 s"):
        fleet._each(engines, lambda client: client.call("POST", "/pause_generation", timeout=1.0), doing="pausing")


def test_three_missed_checks_in_a_row_are_one_end():
    strikes = Strikes(limit=3)
    looks = [{"a": "late", "b": None}, {"a": "late", "b": "late"}, {"a": None, "b": "late"}] + [{"a": "late", "b": "late"}] * 3
    assert [strikes.count(look) for look in looks] == [[], [], [], ["b"], [], ["a"]]


def test_the_watch_ends_the_engine_that_stopped_answering_and_leaves_with_the_block():
    ended, looks = threading.Event(), []
    missed = {"engine a": None, "router": "no answer within 1 s"}
    watch = HealthWatch(
        lambda: looks.append(1),
        lambda: missed,
        lambda label: ended.set() if label == "router" else None,
        interval=0.001,
        first_wait=0.0,
    )
    with watch:
        assert ended.wait(30)
    assert len(looks) >= 3
    assert not watch._thread.is_alive()


def test_the_watch_outlives_whatever_looking_and_ending_meet(caplog):
    """The first look meets an actor that is gone; the engine that then misses its checks is ended all the same."""
    ended, looks = threading.Event(), []

    def look():
        looks.append(1)
        raise RuntimeError("the actor of engine a died")

    def end(label):
        if len(looks) < 12:
            raise RuntimeError("its actor does not answer")
        ended.set()

    with HealthWatch(look, lambda: {"engine a": "no answer within 1 s"}, end, interval=0.001, first_wait=0.0):
        assert ended.wait(30)
    told = [record.getMessage() for record in caplog.records if "the watch goes on" in record.getMessage()]
    assert told == [
        "the watch could not see whether engines live: RuntimeError: the actor of engine a died (the watch goes on)",
        "the watch could not see that engine a ends: RuntimeError: its actor does not answer (the watch goes on)",
    ]


@pytest.mark.parametrize(
    "dead, hangs, hopeless",
    [
        ([], False, False),
        (["decode-1"], False, False),
        (["decode-1"], True, True),
        (["decode-1", "decode-2"], False, True),
        (["prefill-0"], False, True),
    ],
)
def test_requests_are_ended_when_the_last_engine_of_a_kind_has_died_or_one_is_out_of_reach(dead, hangs, hopeless):
    fleet = EngineFleet(None, None, None, "token")
    labels = ("prefill-0", "decode-1", "decode-2")
    fleet.engines = [
        SimpleNamespace(
            label=label,
            spec=SimpleNamespace(model="default", role=label.split("-")[0]),
            nodes=(SimpleNamespace(name=f"engine {label}"),),
            url="",
            is_external=False,
        )
        for label in labels
    ]
    fleet._deaths = lambda: {f"engine {label}": Death("killed", hangs, hangs) for label in dead}
    stops = []
    fleet.routers = {"default": SimpleNamespace(is_alive=lambda: not stops, stop=lambda: stops.append(1))}
    fleet.end_hopeless_requests()
    fleet.end_hopeless_requests()
    assert len(stops) == hopeless
