"""A trainer that outlives its ranks (--snapshot-interval): all are started anew from snapshots in main memory, engines stay up.

    load, snapshot --> train --> snapshot, every so many rollouts --> ...
                         | a rank is lost
                         v
    all ranks end --> new ones, on a spare node where one is gone --> newest snapshot that every rank has
                  --> rollouts trained since then are trained again, as they were generated --> what broke is asked again

Nothing is generated again and the engines' weights stay right: what comes of it is the same to the bit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import ray

from slime.config import Config
from slime.ray.calls import ProcessLost
from slime.ray.destinations import Destinations
from slime.ray.machines import lost_nodes
from slime.ray.placement import Placement, with_spares
from slime.ray.same_packages import SamePackages
from slime.ray.snapshot_keeper import SnapshotStore
from slime.ray.standstill import Patience
from slime.ray.train_actor import RankMemory
from slime.ray.train_group import TrainGroup

logger = logging.getLogger(__name__)

T = TypeVar("T")


def make_trainers(config: Config, placement: Placement, patience: Patience) -> Trainers:
    """The trainer's ranks; with --snapshot-interval they are replaced when one is lost."""
    kind = TrainGroup if config.upkeep.snapshot_interval is None else LastingTrainers
    return kind(config, placement, patience)


class Restarts:
    """How often, and where, a run may start its trainer anew."""

    def __init__(self, limit: int) -> None:
        self.limit, self.made = limit, 0
        self._places: set[str] = set()

    def allow(self, lost: ProcessLost, where: str) -> None:
        """Count one. Raises RuntimeError with the reason where it is one too many."""
        if where in self._places:
            raise RuntimeError(f"{lost}\nit is the second loss while {where}: starting the trainer anew does not help")
        if self.made >= self.limit:
            raise RuntimeError(f"{lost}\nthe trainer was started anew {self.made} times before (--max-trainer-restarts)")
        self._places.add(where)
        self.made += 1


@dataclass(frozen=True)
class _Trained:
    """A rollout that is not in every snapshot, as it was trained."""

    number: int
    """Rollouts that were trained with it."""
    batch: ray.ObjectRef
    steps: Sequence


class LastingTrainers:
    """As a TrainGroup for those who call it."""

    def __init__(self, config: Config, placement: Placement, patience: Patience) -> None:
        rules = config.upkeep
        self._config, self._patience = config, patience
        self.placement = placement
        """Of the ranks that live; another one after a node was lost."""
        self._interval = rules.snapshot_interval
        self._restarts = Restarts(rules.max_trainer_restarts)
        self._store = SnapshotStore(self._nodes(), patience, peers=rules.snapshot_peer, versions=rules.snapshot_versions)
        self._group = TrainGroup(config, placement, patience)
        self._trained = 0
        """Rollouts, those before this start of the run included."""
        self._since: list[_Trained] = []
        self._versions: list[int] = []
        self._unfinished: tuple[int, dict | None] | None = None
        """A save that is written beside training: it is lost with the ranks."""
        self._memory: list[RankMemory] = []
        self._lost: ProcessLost | None = None
        """Of a trainer that was asleep: it is started anew when it has the devices."""
        self.destinations = Destinations()

    def _nodes(self) -> list[str]:
        return [slot.node_ip for slot in self.placement.trainer_slots]

    @property
    def has_failed(self) -> bool:
        return self._lost is not None or self._group.has_failed

    # --- start: whatever breaks here ends the run ---

    def device_kind(self) -> str:
        return self._group.device_kind()

    def check_hooks(self) -> None:
        self._group.check_hooks()

    def start(self):
        return self._group.start()

    def load(self):
        loaded = self._group.load()
        self._trained = loaded.start_rollout_id
        self._take_snapshot()
        return loaded

    # --- calls that are made again of new ranks ---

    def train(self, batch: ray.ObjectRef, steps: Sequence):
        report = self._lasting(lambda: self._group.train(batch, steps), f"training rollout {self._trained + 1}")
        self._trained += 1
        self._since.append(_Trained(self._trained, batch, steps))
        if self._trained % self._interval == 0:
            seconds = self._take_snapshot()
            report = replace(report, metrics={**report.metrics, "perf/snapshot_time": seconds})
        return report

    def save(self, rollout_id: int, data_state: dict | None) -> None:
        self._unfinished = None
        self._lasting(lambda: self._group.save(rollout_id, data_state), f"saving rollout {rollout_id + 1}")
        if self._config.checkpoint.async_save:
            self._unfinished = (rollout_id, data_state)

    def finish_save(self) -> None:
        self._lasting(lambda: self._group.finish_save(), f"finishing the save before rollout {self._trained + 1}")
        self._unfinished = None

    def export_hf(self, folder: str) -> None:
        self._lasting(lambda: self._group.export_hf(folder), f"writing {folder}")

    def memory(self) -> list[RankMemory]:
        """As far as it is known: nobody is started anew for it."""
        try:
            self._memory = self._group.memory() if self._lost is None else self._memory
        except ProcessLost as lost:
            self._leave_for_later(lost)
        return self._memory

    def wake(self) -> None:
        self._lasting(lambda: self._group.wake(), f"waking for rollout {self._trained + 1}")

    def sleep(self, what: str) -> None:
        if what != "weights":
            self._lasting(lambda: self._group.sleep(what), f"going to sleep after rollout {self._trained}")
            return
        try:  # the engines have their weights, and soon all memory
            self._group.sleep(what)
        except ProcessLost as lost:
            self._leave_for_later(lost)

    # --- calls that engines take part in: who made them makes way for new ranks, calls `recover`, and begins anew ---

    def stream(self, version: int):
        self._group.destinations = self.destinations
        return self._group.stream(version)

    def check(self, version: int) -> list[str]:
        return self._group.check(version)

    def can_recover(self, error: RuntimeError) -> bool:
        """Whether it is about lost ranks, not about engines or code."""
        return isinstance(error, ProcessLost) and self._group.has_failed

    def recover(self, error: ProcessLost) -> None:
        """Start anew after a loss in `stream` or `check`. Raises RuntimeError where that is not allowed or not possible."""
        self._start_anew(error, f"sending weights after rollout {self._trained}")

    def stop(self) -> None:
        self._group.stop()
        self._store.stop()

    # --- the restart ---

    def _lasting(self, ask: Callable[[], T], where: str) -> T:
        if self._lost is not None:
            self._start_anew(self._lost, where)
        while True:
            try:
                return ask()
            except ProcessLost as lost:
                self._start_anew(lost, where)

    def _leave_for_later(self, lost: ProcessLost) -> None:
        logger.warning("%s\nthe trainer sleeps, and is started anew when it is needed", lost)
        self._lost = lost
        self._group.stop_and_wait()

    def _start_anew(self, lost: ProcessLost, where: str) -> None:
        started = time.monotonic()
        while True:
            self._restarts.allow(lost, where)
            logger.warning("%s\nstarting the trainer anew from its snapshot; engines stay up", lost)
            try:
                version = self._replace_group()
                break
            except ProcessLost as again:
                lost, where = again, f"starting the trainer anew ({where})"
        self._lost = None
        again = self._trained - version
        told = f"{again} rollout{'s' * (again > 1)} trained again" if again else "no finished rollout was lost"
        seconds, made, limit = time.monotonic() - started, self._restarts.made, self._restarts.limit
        logger.warning(
            "the trainer runs again after %.1f s, from its snapshot of rollout %d: %s; restart %d of %d "
            "(--max-trainer-restarts)",
            seconds, version, told, made, limit,
        )  # fmt: skip

    def _replace_group(self) -> int:
        """New ranks with the state that the lost ones had before what broke. The version that they began with."""
        self._group.stop_and_wait()
        if lost := lost_nodes(set(self._nodes())):
            self.placement = with_spares(self.placement, lost)
            SamePackages(self._nodes()).check()
        self._store.nodes = self._nodes()
        version = self._store.newest()
        if version is None or any(number not in self._kept() for number in range(version + 1, self._trained + 1)):
            raise RuntimeError(
                "no snapshot is whole in which every rank has a part: more was lost than a node and its peer keep; "
                "run the same command again to resume from the last checkpoint"
            )
        self._group = TrainGroup(self._config, self.placement, self._patience)
        self._group.start()
        self._group.restore(self._store.bring_home(version))
        if self._unfinished is not None and self._unfinished[0] + 1 < version:
            logger.warning("the save of rollout %d is lost, if it was not in force yet", self._unfinished[0] + 1)
            self._unfinished = None
        self._save_again(version)
        for number in range(version + 1, self._trained + 1):
            rollout = self._kept()[number]
            self._group.train(rollout.batch, rollout.steps)
            self._save_again(number)
        return version

    def _kept(self) -> dict[int, _Trained]:
        return {rollout.number: rollout for rollout in self._since}

    def _save_again(self, number: int) -> None:
        if self._unfinished is not None and self._unfinished[0] + 1 == number:
            self._group.save(*self._unfinished)

    def _take_snapshot(self) -> float:
        """Seconds. Rollouts are kept from the snapshot before on: should a node be lost before its copy is made, that one is
        what all ranks have."""
        started = time.monotonic()

        def take() -> bool:
            return self._store.take(self._trained, self._group.snapshot_bytes(), self._group.write_snapshot)

        taken = self._lasting(take, f"taking the snapshot of rollout {self._trained}") if self._versions else take()
        if taken:
            self._versions = [*self._versions[-1:], self._trained]
            self._since = [rollout for rollout in self._since if rollout.number > self._versions[0]]
        return time.monotonic() - started


Trainers = TrainGroup | LastingTrainers
