"""An engine over two nodes of which an actor is gone: who is stopped, replaced and started again, in which order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from slime.engine.ports import EnginePorts
from slime.ray import engine_fleet, engine_nodes
from slime.ray.engine_actor import EngineAddress
from slime.ray.engine_fleet import Engine, EngineFleet
from slime.ray.engine_nodes import Death, EngineNode
from slime.ray.fates import Process


class Actor:
    """Writes down what it is told. Each method's `remote` gives what `gather` then takes for the answer."""

    def __init__(self, name: str, events: list[str], address: EngineAddress | None = None):
        self.name, self.events, self.address = name, events, address

    def __getattr__(self, method: str):
        def remote():
            self.events.append(f"{method} {self.name}")
            return self.address

        return SimpleNamespace(remote=remote)


def address(number: int) -> EngineAddress:
    ports = EnginePorts(15000 + number, 15010 + number, 15020 + number)
    return EngineAddress(f"http://10.0.0.{number}:1", None, "10.0.0.1:15021", ports, Process(f"10.0.0.{number}", number))


@pytest.fixture
def fleet(monkeypatch):
    events: list[str] = []
    monkeypatch.setattr(engine_fleet, "gather", lambda refs, **how: dict(refs))
    monkeypatch.setattr(engine_fleet.ray, "kill", lambda actor: events.append(f"kill {actor.name}"))
    monkeypatch.setattr(
        engine_nodes, "stop", lambda nodes, silent: events.append(f"stop {', '.join(node.name for node in nodes)}")
    )
    monkeypatch.setattr(engine_nodes, "lost_nodes", lambda addresses: [])
    fleet = EngineFleet(None, None, None, "token")
    fleet.events = events

    def node(label: str, number: int) -> EngineNode:
        found = address(number)
        name = f"node {number - 1} of engine {label}"
        return EngineNode(
            name, f"10.0.0.{number}", Actor(f"{label}-{number - 1}", events, found), None, found.ports, found.actor
        )

    def engine(label: str) -> Engine:
        spec = SimpleNamespace(label=label, model="default", role="regular", num_nodes=2)
        return Engine(spec, f"http://{label}", None, (node(label, 1), node(label, 2)))

    fleet.engines = [engine("a"), engine("b")]

    def replacement(spec, number, meeting=None, ports=None) -> EngineNode:
        events.append(f"new actor for {spec.label}-{number}, ranks meet at {meeting}, port {ports.http}")
        old = next(e for e in fleet.engines if e.spec is spec).nodes[number]
        return EngineNode(old.name, old.node_ip, Actor(f"new {spec.label}-{number}", events, old.actor.address), None, ports)

    fleet._node = replacement
    fleet._abort_on = lambda engines: events.append(f"abort on {', '.join(engine.label for engine in engines)}")
    return fleet


def test_a_lost_actor_is_replaced_at_its_address_and_its_partner_starts_its_server_again(fleet):
    fleet._deaths = lambda but=(): {"node 1 of engine b": Death("its actor is gone", actor_is_lost=True)}
    a, b = fleet.engines
    assert fleet.recover() == ["b"]
    assert fleet.events == [
        "abort on a",
        "stop node 0 of engine b, node 1 of engine b",
        "start b-0",
        "kill b-1",
        "new actor for b-1, ranks meet at 10.0.0.1:15021, port 15002",
        "start new b-1",
        "wait_ready b-0",
    ]
    assert fleet.engines[0] is a and fleet.engines[1].url == b.url
    assert [node.actor.name for node in fleet.engines[1].nodes] == ["b-0", "new b-1"]
    assert fleet.engines[1].nodes[1].ports == b.nodes[1].ports and fleet.engines[1].nodes[1].process.pid == 2


def test_nothing_is_touched_while_all_live_and_a_server_alone_keeps_its_actor(fleet):
    fleet._deaths = lambda but=(): {}
    assert fleet.recover() == [] and fleet.events == []
    fleet._deaths = lambda but=(): {"node 0 of engine a": Death("a-0 was killed by signal 9")}
    assert fleet.recover() == ["a"]
    assert fleet.events[-3:] == ["start a-0", "start a-1", "wait_ready a-0"]
    assert not [event for event in fleet.events if event.startswith(("kill", "new"))]


def test_who_was_called_dead_is_started_again_even_if_it_answers_by_then(fleet):
    """A stopped actor that goes on: others have acted on its death, and its server may have missed what they did."""
    looks = [{"node 1 of engine b": Death("its actor has not answered", actor_is_lost=True, hangs=True)}, {}, {}, {}]
    fleet._deaths = lambda but=(): looks.pop(0)
    assert fleet.obituaries() == ["its actor has not answered"]
    assert fleet.recover() == ["b"] and "kill b-1" in fleet.events
    assert fleet.obituaries() == [] and fleet.recover() == []


def test_who_died_after_the_others_were_called_dead_is_started_with_them(fleet):
    looks = [
        {"node 0 of engine a": Death("a-0 was killed by signal 9")},
        {"node 1 of engine b": Death("b-1 was killed by signal 9")},
    ]
    spared = []
    fleet._deaths = lambda but=(): spared.append(list(but)) or looks.pop(0)
    assert fleet.obituaries() == ["a-0 was killed by signal 9"] and fleet.recover() == ["a", "b"]
    assert spared == [[], ["node 0 of engine a"]], "who is known to be dead is not asked again"


def test_an_engine_whose_machine_is_gone_is_not_waited_for(fleet, monkeypatch):
    monkeypatch.setattr(engine_nodes, "lost_nodes", lambda addresses: sorted(addresses & {"10.0.0.2"}))
    fleet._deaths = lambda but=(): {"node 1 of engine b": Death("its node is gone", actor_is_lost=True, hangs=True)}
    with pytest.raises(RuntimeError, match=r"node 10\.0\.0\.2 is gone, and with it node 1 of engine b \(10\.0\.0\.2\)"):
        fleet.recover()
    assert fleet.events == []


def test_a_dead_engine_is_not_asked_again_whether_it_answers(fleet):
    fleet._deaths = lambda but=(): {"node 1 of engine b": Death("its actor is gone", actor_is_lost=True)}
    asked = []
    fleet._each = lambda engines, call, **_: asked.extend(engine.label for engine in engines) or {}
    fleet.end_hopeless_requests()
    fleet.missed_checks(1.0)
    assert asked == ["a"]


def test_an_external_engine_that_is_gone_is_named_and_not_started(fleet, monkeypatch):
    spec = SimpleNamespace(label="default-regular-2", model="default", role="regular", num_nodes=1)
    fleet.engines = [Engine(spec, "http://10.0.0.9:30000", None, ())]
    monkeypatch.setattr(engine_nodes, "deaths", lambda nodes, silent: {})
    monkeypatch.setattr(engine_fleet, "absent", lambda url, token: "ConnectError")
    assert fleet.obituaries() == ["external engine default-regular-2 at http://10.0.0.9:30000 does not answer: ConnectError"]
    with pytest.raises(RuntimeError, match="http://10.0.0.9:30000 is gone, and it is not this run's to start"):
        fleet.recover()
    assert fleet.events == []
