"""Groups between prompts and training, without engines: how many are begun, how old they get, what a resumed run has."""

from __future__ import annotations

import heapq
import random

import pytest

from slime.rollout.stock import Stock
from slime.types.sample import Sample, Status


class Source:
    """Prompts 0, 1, 2, ..., a group of one sample each."""

    def __init__(self, position: int = 0):
        self.position = position

    def get_samples(self, count: int) -> list[list[Sample]]:
        first, self.position = self.position, self.position + count
        return [[Sample(index=index, tokens=[1])] for index in range(first, self.position)]


def stock_of(*, batch=4, bound=1, interval=1, on_stale="regenerate", source=None) -> Stock:
    return Stock(source or Source(), batch=batch, bound=bound, interval=interval, on_stale=on_stale)


def write(one, *versions: int) -> list[Sample]:
    """The group's answer, by these weights."""
    (sample,) = one.original
    meta = {"finish_reason": {"type": "stop"}}
    for version in versions:
        sample.append_response_tokens(tokens=[7], log_probs=[-1.0], meta_info=meta | {"weight_version": version})
    sample.reward = 1.0
    return one.original


def finish(stock: Stock, begun: list, *versions: int) -> None:
    for one in begun:
        stock.finish(one, write(one, *versions))


def test_as_many_groups_are_begun_as_are_trained_before_they_are_too_old():
    stock = stock_of(bound=1)
    stock.updated(1)
    begun = stock.begin()
    assert len(begun) == 8 and stock.room() == 0, "two rollouts of 4: of this version, and of the next"
    finish(stock, begun[:4], 1)
    assert stock.room() == 0, "what is ready is not trained yet"
    assert len(stock.take()) == 4
    assert stock.room() == 0, "4 more would be trained when the weights have changed twice"
    stock.updated(2)
    assert stock.room() == 4


@pytest.mark.parametrize(
    ("bound", "interval", "at_first", "with_one_trained"), [(0, 1, 4, 0), (2, 1, 12, 8), (1, 2, 16, 12), (None, 1, 12, 8)]
)
def test_the_bound_and_the_interval_decide_how_many(bound, interval, at_first, with_one_trained):
    stock = stock_of(bound=bound, interval=interval)
    stock.updated(1)
    begun = stock.begin()
    assert len(begun) == at_first
    finish(stock, begun, 1)
    stock.take()
    assert stock.room() + len(stock.ready) == with_one_trained


def test_what_is_too_old_is_generated_again_by_the_newest_weights_before_anything_new():
    stock = stock_of(batch=2, bound=1)
    stock.updated(1)
    begun = stock.begin()
    finish(stock, begun[:1], 1)
    finish(stock, begun[1:3], 1, 2)
    stock.updated(2)
    assert stock.regenerated == 0, "one version behind is allowed"
    stock.updated(3)
    assert stock.regenerated == 3 and not stock.ready, "a token of version 1 makes the whole group as old"
    again = stock.begin()
    assert [one.original[0].index for one in again] == [0, 1, 2]
    sample = again[1].original[0]
    assert (sample.status, sample.response_length, sample.weight_versions) == (Status.PENDING, 0, []), "nothing of it is left"
    finish(stock, again, 3)
    assert [group[0].index for group in stock.take()] == [0, 1]
    stock.check()


def test_what_is_too_old_may_be_dropped_and_is_counted():
    stock = stock_of(batch=2, bound=0, on_stale="drop")
    stock.updated(1)
    finish(stock, stock.begin(), 1)
    stock.updated(2)
    assert stock.take() is None and stock.dropped == {"stale": 2} and not stock.waiting
    finish(stock, stock.begin(), 2)
    assert [group[0].index for group in stock.take()] == [2, 3]
    stock.check()
    assert stock.taken == 4 == stock.trained + stock.dropped["stale"]


def test_without_recorded_versions_a_group_is_as_old_as_its_beginning():
    stock = stock_of(batch=1, bound=1)
    stock.updated(1)
    first, second = stock.begin()
    first.original[0].reward = second.original[0].reward = 1.0
    stock.finish(first, first.original)
    stock.updated(3)
    assert stock.regenerated == 1
    stock.finish(second, second.original)
    assert stock.take() is None and stock.regenerated == 2, "what comes back too old is not trained either"


def test_the_oldest_groups_are_trained_first():
    stock = stock_of(batch=2, bound=3)
    stock.updated(2)
    begun = stock.begin()[:4]
    for one, version in zip(begun, (2, 1, 2, 1), strict=True):
        stock.finish(one, write(one, version))
    assert [group[0].index for group in stock.take()] == [1, 3]
    assert [group[0].index for group in stock.take()] == [0, 2]


def test_every_group_is_in_one_place_and_a_miscount_is_said():
    stock = stock_of(batch=2, bound=2)
    stock.updated(1)
    begun = stock.begin()
    finish(stock, begun[:3], 1)
    stock.interrupt(begun[3])
    stock.drop(begun[4], "failed")
    stock.take()
    stock.check()
    assert stock.metrics() == {
        "rollout/groups_in_flight": 1.0, "rollout/groups_ready": 1.0, "rollout/groups_buffered": 1.0,
        "rollout/groups_regenerated": 0.0, "rollout/groups_interrupted": 1.0, "rollout/groups_stale_dropped": 0.0,
    }  # fmt: skip
    assert stock.taken == 6 == stock.trained + 1 + 1 + 1 + 1
    stock.trained += 1
    with pytest.raises(AssertionError, match="6 groups were taken, but 3 trained"):
        stock.check()


def test_what_is_outstanding_keeps_finished_answers_and_begins_those_on_their_way_again():
    stock = stock_of(batch=2, bound=2)
    stock.updated(1)
    ready, on_its_way, partial, broken, halted, _ = stock.begin()
    stock.finish(ready, write(ready, 1))
    on_its_way.original[0].tokens = [1, 5]
    write(partial, 1)
    partial.original[0].status, partial.original[0].reward = Status.ABORTED, None
    broken.original[0].status = Status.FAILED
    write(halted, 1)
    halted.original[0].status, halted.original[0].reward = Status.ABORTED, None
    stock.interrupt(halted)
    groups = stock.outstanding()
    assert [(group[0].index, group[0].status, group[0].response_length) for group in groups] == [
        (0, Status.COMPLETED, 1),
        (1, Status.PENDING, 0),
        (2, Status.ABORTED, 1),
        (3, Status.PENDING, 0),
        (5, Status.PENDING, 0),
        (4, Status.ABORTED, 1),
    ]
    groups[0][0].reward = 0.0
    assert stock.ready[0].answered[0].reward == 1.0, "they are copies"


class Machine:
    """Engines that answer in random times, and a trainer; the clock is a heap. Every `interval` rollouts bring a version."""

    TRAINING = 5.0

    def __init__(self, stock: Stock, draw: random.Random, *, interval: int):
        self.stock, self.draw, self.interval = stock, draw, interval
        self.now, self.events, self.counter = 0.0, [], 0
        self.ages: list[int] = []
        self.trained: list[int] = []
        self.saved = (0, [], [], 0, 0)

    def feed(self) -> None:
        for one in self.stock.begin():
            seconds = self.draw.choice([1.0, 1.0, 2.0, 14.0])
            self.counter += 1
            heapq.heappush(self.events, (self.now + seconds, self.counter, one, self.stock.version))

    def until(self, when: float) -> None:
        while self.events and self.events[0][0] <= when:
            self.now, _, one, version = heapq.heappop(self.events)
            fate = self.draw.random()
            if fate < 0.05:
                self.stock.drop(one, "failed")
            elif fate < 0.15:
                self.stock.interrupt(one)
            else:
                self.stock.finish(one, write(one, *range(max(version, 1), self.stock.version + 1)))
            self.feed()
        self.now = max(self.now, when)

    def run(self, rollouts: int) -> None:
        self.stock.updated(1)
        for rollout_id in range(rollouts):
            self.feed()
            while (groups := self.stock.take()) is None:
                self.feed()
                self.until(self.events[0][0])
            self.feed()
            self.ages += [self.stock.version - min(map(int, group[0].weight_versions)) for group in groups]
            self.trained += [group[0].index for group in groups]
            self.until(self.now + self.TRAINING)
            self.stock.check()
            dropped = self.stock.dropped.total()
            self.saved = self.stock.source.position, self.stock.outstanding(), list(self.trained), dropped, self.stock.version
            if (rollout_id + 1) % self.interval == 0:
                self.stock.updated(self.stock.version + 1)


@pytest.mark.parametrize("on_stale", ["regenerate", "drop"])
@pytest.mark.parametrize(("bound", "interval"), [(0, 1), (1, 1), (2, 3), (None, 2)])
def test_whatever_answers_when_the_bound_holds_and_no_prompt_is_lost_or_trained_twice(bound, interval, on_stale):
    for seed in range(20):
        draw = random.Random(seed)
        stock = stock_of(batch=4, bound=bound, interval=interval, on_stale=on_stale)
        first = Machine(stock, draw, interval=interval)
        first.run(9)
        assert bound is None or max(first.ages) <= bound
        # Killed after the last save, whatever was under way: the next run has the saved position, and versions of its own.
        position, groups, trained, dropped, newest = first.saved
        again = stock_of(batch=4, bound=bound, interval=interval, on_stale=on_stale, source=Source(position))
        for (sample,) in groups:
            sample.weight_versions = [str(int(version) - newest) for version in sample.weight_versions]
        again.put_back(groups)
        second = Machine(again, draw, interval=interval)
        second.run(9)
        assert bound is None or max(second.ages) <= bound
        everything = trained + second.trained
        assert len(everything) == len(set(everything)) == 72
        left = {sample.index for (sample,) in again.outstanding()}
        gone = set(range(again.source.position)) - set(everything) - left
        assert len(gone) == dropped + again.dropped.total(), "every other prompt was dropped, and counted"
