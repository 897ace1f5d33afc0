"""A wait that lasts too long is explained: where every process is, who has not come to which collective, what engines say."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from slime.config.upkeep import UpkeepConfig
from slime.ray import fates, witness
from slime.ray.fates import Process
from slime.ray.witness import GroupState, Testimony

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 30.0
_MARGIN = 2.0
_TOLD_PROCESSES = 32
"""Spelled out; of 256 ranks most wait at the same place, and are told as many."""

_WITHOUT_ENGINES = ("training", "saving")
"""What the trainer brings to its end even if the run cannot go on behind it."""
_NOBODY = "no actor has told of its process yet: Ray is starting them"


class Patience:
    """How long the driver waits for one answer: then a report, once for each wait, and where a flag says so the end.

    The rooms of the run add who there is (`processes`), and lines that processes cannot tell (`also`).
    """

    def __init__(self, rules: UpkeepConfig | None = None):
        rules = rules or UpkeepConfig()
        self.exit_seconds = None if rules.hang_exit_minutes is None else 60 * rules.hang_exit_minutes
        self._report_seconds = 60 * rules.hang_report_minutes
        self._longest: dict[str, float] = {}
        self.doing = ""
        """What is waited for, or was at last."""
        self.processes: dict[str, Process] = {}
        self.also: list[Callable[[], Sequence[str]]] = []
        self.gone: Callable[[], Sequence[str]] = list
        """Addresses of engines' machines that are lost, which no wait for engines outlasts: a request to one has minutes."""

    def report_after(self, doing: str) -> float:
        """Seconds. What took an hour before, like the generation of long answers, is expected to take as long again."""
        expected = _MARGIN * self._longest.get(_kind(doing), 0.0)
        return min(max(self._report_seconds, expected), self.exit_seconds or float("inf"))

    def note(self, doing: str, seconds: float) -> None:
        """A wait that ended well."""
        self._longest[_kind(doing)] = max(seconds, self._longest.get(_kind(doing), 0.0))

    def begin(self, doing: str) -> Wait:
        self.doing = doing
        return Wait(self, doing)

    def explain(self) -> str:
        """A line for each process and group; never an error of its own."""
        try:
            told = _told(self.processes, _ask_all(self.processes)) if self.processes else [_NOBODY]
            return "\n  ".join([*told, *(line for tell in self.also for line in tell())])
        except Exception as error:
            return f"what everybody waits for cannot be told: {type(error).__name__}: {error}"


class Wait:
    """One wait; `look` is called again and again while it lasts."""

    def __init__(self, patience: Patience, doing: str):
        self._patience, self._doing = patience, doing
        self._began, self._report = time.monotonic(), ""
        # In driver.log alone: how far a run had come that ended without a word, and where a drill finds its phase.
        logger.debug("waits for: %s", doing)
        self._report_after = patience.report_after(doing)

    def seconds_left(self) -> float:
        """Until the next thing to do."""
        patience, elapsed = self._patience, time.monotonic() - self._began
        until = patience.exit_seconds if self._report else self._report_after
        return float("inf") if until is None else max(0.0, until - elapsed)

    def look(self) -> None:
        """Raises RuntimeError where the wait has to end, with the report, or where a machine of the engines is gone."""
        patience, elapsed = self._patience, time.monotonic() - self._began
        if not self._doing.startswith(_WITHOUT_ENGINES) and (gone := patience.gone()):
            raise RuntimeError(f"Ray has lost {', '.join(gone)}, where engines ran, while {self._doing}")
        if not self._report and elapsed >= self._report_after:
            self._report = f"{self._doing} has lasted {elapsed / 60:.1f} min; who is where:\n  {patience.explain()}"
            if patience.exit_seconds is None or elapsed < patience.exit_seconds:
                logger.warning("%s", self._report)
                return
            raise RuntimeError(f"{self._report}\n  the run ends (--hang-exit-minutes)")
        if self._report and patience.exit_seconds is not None and elapsed >= patience.exit_seconds:
            raise RuntimeError(
                f"{self._doing} has lasted {elapsed / 60:.1f} min, told above: the run ends (--hang-exit-minutes)"
            )

    def end(self) -> None:
        self._patience.note(self._doing, time.monotonic() - self._began)


def _kind(doing: str) -> str:
    """Rollouts, versions and steps are numbered; what is done is not."""
    return re.sub(r"\d+", "N", doing)


def _ask_all(processes: Mapping[str, Process]) -> dict[str, Testimony | str]:
    """Name -> what it says, or what is seen of one that says nothing."""
    alive = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
    by_node: dict[str, dict[str, Process]] = {}
    for name, process in processes.items():
        by_node.setdefault(process.node_ip, {})[name] = process
    looks = {}
    for node_ip, there in by_node.items():
        if node_ip in alive:
            strategy = NodeAffinitySchedulingStrategy(node_id=alive[node_ip], soft=False)
            looks[_ask_node.options(scheduling_strategy=strategy).remote(there)] = node_ip
    done, _ = ray.wait(list(looks), num_returns=len(looks), timeout=_LOOK_SECONDS) if looks else ([], [])
    found: dict[str, Testimony | str] = {}
    for look in done:
        try:
            found |= ray.get(look)
        except ray.exceptions.RayError as error:
            found |= dict.fromkeys(by_node[looks[look]], f"cannot be looked at ({type(error).__name__})")
    return {
        name: found.get(name, f"is on node {process.node_ip}, which does not answer") for name, process in processes.items()
    }


@ray.remote(num_cpus=0, max_retries=0)
def _ask_node(processes: dict[str, Process]) -> dict[str, Testimony | str]:
    return {name: ask_process(process) for name, process in processes.items()}


def ask_process(process: Process) -> Testimony | str:
    """On the process's own node."""
    fate = fates.read_fate(process)
    if fate is not None:
        return fate
    path = fates.witness_path(process.pid)
    said, below = witness.ask(path), fates.stopped_below(process.pid)
    if said is not None:
        return replace(said, lines=(*said.lines, *below))
    return "; ".join([f"runs and does not answer (kernel: {_kernel_wait(process.pid)})", *below])


def _kernel_wait(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/wchan").read_text() or "running"
    except OSError:
        return "unknown"


def _told(processes: Mapping[str, Process], said: Mapping[str, Testimony | str]) -> list[str]:
    """Those that say the same are one line; then who is behind in which group."""
    alike: dict[str, list[str]] = {}
    for name, one in said.items():
        text = one if isinstance(one, str) else "; ".join(one.lines) or "waits for a call"
        alike.setdefault(text, []).append(name)
    lines = []
    for text, names in list(alike.items())[:_TOLD_PROCESSES]:
        first = f"{names[0]} ({processes[names[0]]})"
        lines.append(f"{first}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {text}")
    states = {name: one.groups for name, one in said.items() if isinstance(one, Testimony)}
    silent = [name for name, one in said.items() if isinstance(one, str)]
    return lines + missing(states, silent)


def missing(states: Mapping[str, Sequence[GroupState]], silent: Sequence[str] = ()) -> list[str]:
    """Per process group in which ranks differ: which collective has begun, and who has not come to it.

    silent: processes that say nothing; where one may be a rank that nobody speaks for, it is named, if the group has done
    anything yet.
    """
    groups: dict[str, dict[int, tuple[str, GroupState]]] = {}
    for name, own in states.items():
        for state in own:
            groups.setdefault(state.name, {})[state.rank] = (name, state)
    lines = []
    for members in groups.values():
        _, any_state = next(iter(members.values()))
        newest = max(state.num_begun for _, state in members.values())
        behind = [f"{name} is at {state.num_begun}" for name, state in members.values() if state.num_begun < newest]
        unheard = [rank for rank in any_state.ranks if rank not in members]
        if unheard and silent and newest:
            behind.append(f"rank {', '.join(map(str, unheard))} of it says nothing")
        if behind:
            there = [name for name, state in members.values() if state.num_begun == newest]
            who = f"{any_state.title or any_state.name} (ranks {', '.join(map(str, any_state.ranks))})"
            lines.append(f"{who}: collective {newest} has begun on {', '.join(there)}; {', '.join(behind)}")
    return lines
