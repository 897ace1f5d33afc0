"""Who starts when: engines and trainer on shared GPUs must not measure and fill the same memory at once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import slime.ray.run as run_module
from slime.config.upkeep import UpkeepConfig
from slime.ray.placement import Placement


class Recorder:
    """Engines and trainer in one: writes down what it is told."""

    def __init__(self, kind: str):
        self.events, self.kind = [], kind
        self.placement = Placement(None, (), ())

    def device_kind(self):
        return self.kind

    def destinations(self, trainer_slots):
        assert trainer_slots == ()
        self.events.append("destinations")

    def start(self):
        self.events.append("trainer starts")
        return []

    def load(self):
        self.events.append("trainer loads")
        return SimpleNamespace(start_rollout_id=0, data_state=None, train_steps=0)

    def begin_start(self):
        self.events.append("engines start")
        return "engines"

    def finish_start(self, started):
        assert started == "engines"
        if "engines are up" not in self.events:
            self.events.append("engines are up")

    def __getattr__(self, name):
        return lambda *args: self.events.append(" ".join([name, *map(str, args)]))


@pytest.fixture
def started(monkeypatch):
    def start(kind: str, *, colocate: bool) -> list[str]:
        both = Recorder(kind)
        monkeypatch.setattr(run_module, "place", lambda **sizes: Placement(None, (), ()))
        packages = SimpleNamespace(check=lambda: both.events.append("packages compared"))
        monkeypatch.setattr(run_module, "SamePackages", lambda addresses: packages)
        actor = SimpleNamespace(remote=lambda *_: None)
        monkeypatch.setattr(run_module, "RolloutActor", SimpleNamespace(options=lambda **_: actor))
        monkeypatch.setattr(run_module, "this_node", lambda: None)
        monkeypatch.setattr(run_module, "RolloutSide", lambda *_: both)
        monkeypatch.setattr(run_module, "make_trainers", lambda *_: both)
        monkeypatch.setattr(run_module, "Telling", lambda config: both)
        monkeypatch.setattr(run_module, "start_page", lambda shares, config: [])
        monkeypatch.setattr(
            run_module, "sync_weights", lambda *_, **__: both.events.append("first weights") or SimpleNamespace(line=str)
        )
        cluster = SimpleNamespace(
            actor_num_nodes=1,
            actor_num_gpus_per_node=1,
            rollout_num_gpus=1,
            colocate=colocate,
            offload_rollout=colocate,
            offload_train=colocate,
        )
        debug = SimpleNamespace(debug_rollout_only=False, debug_train_only=False)
        config = SimpleNamespace(
            cluster=cluster,
            debug=debug,
            engine=SimpleNamespace(check_weight_update_equal=False, rehearsed=None, use_fault_tolerance=False),
            data=SimpleNamespace(num_rollout=1),
            checkpoint=SimpleNamespace(save=None),
            upkeep=UpkeepConfig(),
        )
        run_module.Run(config).start()
        order = (
            "packages compared",
            "load_plugins",
            "check_hooks",
            "engines start",
            "engines are up",
            "release_memory",
            "trainer starts",
            "trainer loads",
            "first weights",
        )
        return [event for event in both.events if event in order]

    return start


def test_functions_that_flags_name_and_the_nodes_packages_are_checked_before_anything_comes_up(started):
    assert started("host", colocate=False)[:4] == ["load_plugins", "check_hooks", "packages compared", "engines start"]


def test_on_shared_gpus_the_trainer_starts_when_the_engines_have_given_their_memory_back(started):
    assert started("cuda", colocate=True) == [
        "load_plugins", "check_hooks", "packages compared", "engines start", "engines are up", "release_memory",
        "trainer starts", "trainer loads", "first weights",
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "colocate"), [("host", True), ("cuda", False)])
def test_elsewhere_they_start_side_by_side(started, kind, colocate):
    events = started(kind, colocate=colocate)
    assert events.index("trainer loads") < events.index("engines are up") < events.index("first weights")
    assert events.count("release_memory") == colocate
