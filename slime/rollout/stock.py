"""Groups between the data source and training, where generation goes on all the time.

    source --begin--> started --finish--> ready --take--> trained
                        ^  |                |
               waiting -+  +- interrupt     +- too old: regenerated (waiting again) or dropped

Every prompt that was taken from the source is in exactly one of these places, trained, or dropped for a reason that is counted:

    taken = trained + dropped + waiting + started + ready

How old a group is: weight versions between the oldest that wrote a token of it and the newest that the engines have. No more
groups are begun than training takes before they are older than the bound, so few are ever too old.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from slime.rollout.base_types import Group, flatten
from slime.rollout.staleness import oldest_version
from slime.types.sample import Status

AHEAD_WITHOUT_BOUND = 2
"""As many versions of work are begun ahead where nothing bounds the age of samples."""


@dataclass
class Started:
    """One group that is being generated, or is back."""

    number: int
    """In the order of beginning."""
    original: Group
    """As it was begun, one sample for each answer; what is generated again."""
    version: int
    """Newest weights when it was begun."""
    answered: list = field(default_factory=list)
    """The group as it came back; with fan-out its elements are lists."""

    @property
    def oldest(self) -> int:
        """Version of the oldest weights in it; a generate function that records none is taken at the group's beginning."""
        versions = [version for sample in flatten(self.answered) for version in sample.weight_versions]
        found = oldest_version(versions)
        return self.version if found is None else found


class Stock:
    """Pure bookkeeping: no engine, no clock, no event loop."""

    def __init__(self, source: Any, *, batch: int, bound: int | None, interval: int, on_stale: Literal["regenerate", "drop"]):
        """source: of prompts (slime.rollout.data_source). batch: groups of a rollout. bound: versions that a trained group may
        be old, None for any. interval: rollouts from one version to the next."""
        self.source = source
        self._batch, self._bound, self._interval, self._on_stale = batch, bound, interval, on_stale
        self.waiting: deque[Group] = deque()
        """To be begun before anything new: interrupted, too old, or of the run before."""
        self.started: dict[int, Started] = {}
        self.ready: dict[int, Started] = {}
        self.version = 0
        """Newest that the engines have."""
        self._of_version = 0
        self._number = 0
        self.taken = 0
        self.trained = 0
        self.dropped: Counter[str] = Counter()
        self.regenerated = 0
        self.interrupted = 0

    # ------------------------------------------------------------------------------------------------ the way of a group

    def room(self) -> int:
        """How many groups may be begun now: those that are trained before the bound, had they been written by today's weights.

        A group begun now with p before it is trained p // batch rollouts from now; by then (t + p // batch) // interval
        versions have come, t rollouts of this version having been trained.
        """
        ahead = AHEAD_WITHOUT_BOUND if self._bound is None else self._bound
        most = ((ahead + 1) * self._interval - self._of_version) * self._batch
        return max(0, most - len(self.started) - len(self.ready))

    def begin(self) -> list[Started]:
        """As many groups as there is room for; the caller generates them."""
        room = self.room()
        groups = [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]
        if room > len(groups):
            new = self.source.get_samples(room - len(groups))
            self.taken += len(new)
            groups += new
        begun = []
        for group in groups:
            one = Started(self._number, group, self.version)
            self._number += 1
            self.started[one.number] = one
            begun.append(one)
        return begun

    def finish(self, one: Started, answered: list) -> None:
        """It came back whole, graded, and is to be trained."""
        one.answered = answered
        self.ready[one.number] = self.started.pop(one.number)

    def put_back(self, groups: list[Group]) -> None:
        """Groups that the run before had begun."""
        self.waiting.extend(groups)
        self.taken += len(groups)

    def interrupt(self, one: Started) -> None:
        """It came back unfinished: begun again before anything new, it goes on where it was."""
        self.waiting.append(self.started.pop(one.number).original)
        self.interrupted += 1

    def drop(self, one: Started, reason: str) -> None:
        del self.started[one.number]
        self.dropped[reason] += 1

    def take(self) -> list[list] | None:
        """The groups of a rollout, the oldest of those that are ready, by the order of their prompts; None while there are too
        few."""
        self.expire()
        if len(self.ready) < self._batch:
            return None
        chosen = sorted(self.ready.values(), key=lambda one: (one.oldest, one.number))[: self._batch]
        for one in chosen:
            del self.ready[one.number]
        self.trained += len(chosen)
        self._of_version += 1
        return [one.answered for one in chosen]

    def updated(self, version: int) -> None:
        """The engines have newer weights."""
        if version != self.version:
            self.version, self._of_version = version, 0
        self.expire()

    def expire(self) -> None:
        """What is ready and too old is begun again by the newest weights, or given up."""
        if self._bound is None:
            return
        for one in [one for one in self.ready.values() if self.version - one.oldest > self._bound]:
            del self.ready[one.number]
            if self._on_stale == "drop":
                self.dropped["stale"] += 1
                continue
            for sample in one.original:
                sample.reset_for_retry()
            self.waiting.append(one.original)
            self.regenerated += 1

    # ------------------------------------------------------------------------------------------------------------ ledger

    @property
    def num_too_old(self) -> int:
        return self.regenerated + self.dropped["stale"]

    def check(self) -> None:
        dropped, places = dict(self.dropped), {name: len(getattr(self, name)) for name in ("waiting", "started", "ready")}
        accounted = self.trained + sum(dropped.values()) + sum(places.values())
        assert self.taken == accounted, (
            f"{self.taken} groups were taken, but {self.trained} trained + {dropped} dropped + {places} make {accounted}"
        )

    def metrics(self) -> dict[str, float]:
        """Where groups are now; regenerated and interrupted since the start."""
        return {
            "rollout/groups_in_flight": float(len(self.started)),
            "rollout/groups_ready": float(len(self.ready)),
            "rollout/groups_buffered": float(len(self.waiting)),
            "rollout/groups_regenerated": float(self.regenerated),
            "rollout/groups_interrupted": float(self.interrupted),
            "rollout/groups_stale_dropped": float(self.dropped["stale"]),
        }

    # ------------------------------------------------------------------------------------------------------------- position

    def outstanding(self) -> list[list]:
        """Copies of all groups that were taken and neither trained nor dropped, in the order in which they are to be begun
        again: what is ready as it is, what is being generated from its last interruption."""
        ready = [copy.deepcopy(one.answered) for one in sorted(self.ready.values(), key=lambda one: one.number)]
        started = [_unfinished(one.original) for one in sorted(self.started.values(), key=lambda one: one.number)]
        return [*ready, *started, *(copy.deepcopy(group) for group in self.waiting)]

    def forget(self) -> None:
        """All of it is back in the source, which went back to a position."""
        lost = len(self.waiting) + len(self.started) + len(self.ready)
        self.taken -= lost
        self.waiting.clear()
        self.started.clear()
        self.ready.clear()


def _unfinished(group: Sequence) -> list:
    """A copy in which nothing is half done: an answer that is on its way, or broke, begins again."""
    kept = copy.deepcopy(list(group))
    for sample in flatten(kept):
        if sample.status in (Status.PENDING, Status.FAILED):
            sample.reset_for_retry()
    return kept
