import pytest

from slime.ray.lease import Awake, FreeLease, Holder, Lease
from slime.ray.placement import slot_counts


class Recorder:
    """Engines and trainer in one: writes down who is told what."""

    def __init__(self):
        self.events = []

    def release_memory(self):
        self.events.append("engines release")

    def resume_memory(self, what, labels=None):
        self.events.append(f"{'engines' if labels is None else labels} resume {what}")

    def sleep(self, what):
        self.events.append(f"trainer puts {what} to sleep")

    def wake(self):
        self.events.append("trainer wakes")


def test_one_iteration_hands_the_devices_over_in_the_legal_order():
    both = Recorder()
    lease = Lease(both, both, holder=Holder.ENGINES)
    with lease.training():
        both.events.append("train")
    with lease.syncing():
        both.events.append("sync")
    assert both.events == [
        "engines release",
        "trainer wakes",
        "train",
        "trainer puts steps to sleep",
        "engines resume weights",
        "sync",
        "trainer puts weights to sleep",
        "engines resume kv_cache",
    ]
    assert lease.holder is Holder.ENGINES


def test_a_trainer_that_keeps_its_memory_never_sleeps():
    """--no-offload-train: the engines still give theirs and take it back."""
    both = Recorder()
    lease = Lease(both, Awake(), holder=Holder.ENGINES)
    with lease.training():
        pass
    with lease.syncing():
        pass
    assert both.events == ["engines release", "engines resume weights", "engines resume kv_cache"]


class Mortal(Recorder):
    """One engine is dead until it is revived."""

    dead = ["decode-1"]

    def release_memory(self, labels=None):
        self.events.append("engines release" if labels is None else f"{labels} release")

    def revive(self, prepare):
        dead, self.dead = self.dead, []
        if dead:
            prepare()
            self.events.append(f"start {dead}")
        return dead


def test_an_engine_that_died_after_its_last_answer_is_started_again_before_the_trainer_wakes():
    both = Mortal()
    with Lease(both, both, holder=Holder.ENGINES, revive=both.revive).training():
        pass
    assert both.events == ["start ['decode-1']", "engines release", "trainer wakes"]


def back_again(prepare) -> list[str]:
    """An engine that did not answer is there after all, once everything is prepared for its start."""
    prepare()
    return []


def test_a_trainer_that_slept_for_an_engine_which_is_back_again_wakes():
    both = Recorder()
    with Lease(both, both, holder=Holder.TRAINER, revive=back_again).syncing():
        both.events.append("sync")
    assert both.events[:5] == [
        "trainer puts steps to sleep", "trainer puts weights to sleep", "trainer wakes", "trainer puts steps to sleep",
        "engines resume weights",
    ]  # fmt: skip
    both = Recorder()
    lease = Lease(both, both, holder=Holder.SYNC, revive=back_again)
    assert not lease.restart_engines(), "what broke was no death"
    assert both.events == ["trainer puts weights to sleep", "trainer wakes", "trainer puts steps to sleep"]


def test_an_engine_that_kept_its_memory_and_is_back_again_ends_the_run():
    both = DiesAt("release")
    with pytest.raises(RuntimeError, match="default-decode-1"):
        with Lease(both, both, holder=Holder.ENGINES, revive=back_again, died_lately=lambda: True).training():
            pass


def test_an_engine_that_died_beside_training_is_started_again_while_the_trainer_sleeps():
    both = Mortal()
    with Lease(both, both, holder=Holder.TRAINER, revive=both.revive).syncing():
        both.events.append("sync")
    assert both.events == [
        "trainer puts steps to sleep",
        "trainer puts weights to sleep",
        "start ['decode-1']",
        "['decode-1'] release",
        "trainer wakes",
        "trainer puts steps to sleep",
        "engines resume weights",
        "sync",
        "trainer puts weights to sleep",
        "engines resume kv_cache",
    ]


def test_on_devices_of_its_own_an_engine_that_died_beside_training_is_started_before_the_sync():
    both = Mortal()
    lease = FreeLease(both.revive)
    with lease.training():
        both.events.append("train")
    with lease.syncing():
        both.events.append("sync")
    assert both.events == ["train", "start ['decode-1']", "sync"]


def test_an_engine_that_died_in_the_sync_is_started_again_while_the_trainer_sleeps():
    both = Mortal()
    both.dead = []
    lease = Lease(both, both, holder=Holder.TRAINER, revive=both.revive)
    with lease.syncing():
        both.events.clear()
        assert not lease.restart_engines() and both.events == [], "nobody is dead"
        both.dead = ["decode-1"]
        assert lease.restart_engines()
        both.events.append("sync")
    assert both.events == [
        "trainer puts weights to sleep",
        "start ['decode-1']",
        "['decode-1'] release",
        "trainer wakes",
        "trainer puts steps to sleep",
        "['decode-1'] resume weights",
        "sync",
        "trainer puts weights to sleep",
        "engines resume kv_cache",
    ]
    with pytest.raises(AssertionError, match="devices are with engines"):
        lease.restart_engines()


class DiesAt(Mortal):
    """decode-1 dies of one call; the others have done what was asked."""

    def __init__(self, call: str):
        super().__init__()
        self.dead, self.deadly = [], call

    def _meet(self, call: str) -> None:
        if call == self.deadly and not self.dead:
            self.dead, self.deadly = ["decode-1"], ""
            raise RuntimeError("engine default-decode-1: the server is gone")

    def release_memory(self, labels=None):
        super().release_memory(labels)
        self._meet("release")

    def resume_memory(self, what, labels=None):
        super().resume_memory(what, labels)
        self._meet(what)


def lease_of(both: DiesAt, holder: Holder) -> Lease:
    return Lease(both, both, holder=holder, revive=both.revive, died_lately=lambda: bool(both.dead))


def test_an_engine_that_dies_of_giving_memory_back_is_started_again_before_the_trainer_wakes():
    both = DiesAt("release")
    with lease_of(both, Holder.ENGINES).training():
        pass
    assert both.events == ["engines release", "start ['decode-1']", "['decode-1'] release", "trainer wakes"]


def test_an_engine_that_dies_of_taking_memory_for_weights_is_started_again_while_the_trainer_sleeps():
    both = DiesAt("weights")
    with lease_of(both, Holder.TRAINER).syncing():
        both.events.append("sync")
    assert both.events == [
        "trainer puts steps to sleep",
        "engines resume weights",
        "trainer puts weights to sleep",
        "start ['decode-1']",
        "['decode-1'] release",
        "trainer wakes",
        "trainer puts steps to sleep",
        "['decode-1'] resume weights",
        "sync",
        "trainer puts weights to sleep",
        "engines resume kv_cache",
    ]


def test_an_engine_that_dies_of_taking_memory_for_its_cache_is_left_to_who_generates_next(caplog):
    both = DiesAt("kv_cache")
    lease = lease_of(both, Holder.TRAINER)
    with lease.syncing():
        both.events.clear()
    assert both.events == ["trainer puts weights to sleep", "engines resume kv_cache"]
    assert lease.holder is Holder.ENGINES and both.dead == ["decode-1"]
    assert "engine default-decode-1: the server is gone" in caplog.text


@pytest.mark.parametrize("call", ["release", "weights", "kv_cache"])
def test_a_hand_over_that_breaks_while_all_engines_live_ends_the_run(call):
    both = DiesAt(call)
    lease = Lease(both, both, holder=Holder.ENGINES, revive=lambda prepare: [], died_lately=lambda: False)
    with pytest.raises(RuntimeError, match="default-decode-1"):
        with lease.training():
            pass
        with lease.syncing():
            pass


def test_training_twice_without_giving_the_devices_back_is_our_mistake():
    both = Recorder()
    lease = Lease(both, both, holder=Holder.ENGINES)
    with lease.training():
        pass
    with pytest.raises(AssertionError, match="devices are with trainer"):
        with lease.training():
            pass


def test_a_failed_sync_does_not_wake_the_cache_of_half_updated_engines():
    both = Recorder()
    lease = Lease(both, both, holder=Holder.TRAINER)
    with pytest.raises(RuntimeError):
        with lease.syncing():
            raise RuntimeError("a bucket was refused")
    assert both.events == ["trainer puts steps to sleep", "engines resume weights"]
    assert lease.holder is Holder.SYNC


def test_separate_devices_never_change_hands():
    lease = FreeLease()
    for _ in range(2):
        with lease.training():
            pass
        with lease.syncing():
            pass
    assert lease.holder is Holder.ENGINES


@pytest.mark.parametrize(
    ("num_trainer", "num_engine", "colocate", "expected"),
    [(256, 256, True, (256, 0)), (8, 4, True, (8, 0)), (8, 16, True, (16, 0)), (8, 4, False, (12, 8)), (0, 4, False, (4, 0))],
)
def test_slots_are_shared_when_colocated_and_side_by_side_otherwise(num_trainer, num_engine, colocate, expected):
    assert slot_counts(num_trainer=num_trainer, num_engine=num_engine, colocate=colocate) == expected
