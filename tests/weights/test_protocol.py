import pytest

from slime.weights.protocol import StreamReport, sync_weights
from slime.weights.stopwatch import StreamSeconds


class RecordingEngines:
    """Engines that write down what they were told; `found` is the version they report afterwards."""

    def __init__(self, events, found, sums=()):
        self.events, self.found, self.sums = events, found, list(sums)

    def pause(self):
        self.events.append("pause")

    def flush(self):
        self.events.append("flush")

    def begin(self, version):
        self.events.append(f"begin {version}")

    def load(self, version, folder):
        self.events.append(f"load {version} from {folder}")

    def end(self, version):
        self.events.append(f"end {version}")

    def versions(self):
        self.events.append("check")
        return self.found

    def checksums(self, labels):
        self.events.append(f"checksums {' '.join(labels)}")
        return {label: self.sums.pop(0) for label in labels}

    def proceed(self):
        self.events.append("continue")


class RecordingTrainers:
    def __init__(self, events, error=None, differs=None, lost=(), silent=(), published=""):
        self.events, self.error, self.differs, self.lost, self.silent = events, error, differs, lost, silent
        self.published = published

    def stream(self, version):
        self.events.append(f"stream {version}")
        if self.error:
            raise self.error
        return StreamReport(buckets=2, nbytes=10, tensors=5, published=self.published, lost=self.lost)

    def check(self, version):
        self.events.append(f"read back {version}")
        if self.differs:
            raise RuntimeError(self.differs)
        return self.silent


def test_an_update_runs_in_the_one_legal_order():
    events = []
    report = sync_weights(RecordingEngines(events, {"p": "7", "d": "7"}), RecordingTrainers(events), version=7)
    assert events == ["pause", "flush", "begin 7", "stream 7", "end 7", "check", "continue"]
    assert report.line().startswith("weights v7: 2 buckets, 5 tensors")
    assert 0 <= report.stream_seconds <= report.pause_seconds, "what streams is a part of the pause"
    assert list(report.steps) == ["pause", "flush", "begin", "stream", "end", "continue"]
    assert sum(report.steps.values()) <= report.pause_seconds
    assert report.engine_seconds == pytest.approx(sum(report.steps.values()) - report.steps["stream"])


def test_an_engine_with_another_version_keeps_all_paused_and_is_named():
    events = []
    with pytest.raises(RuntimeError, match=r"v3.*decode 0.*2"):
        sync_weights(RecordingEngines(events, {"prefill 0": "3", "decode 0": "2"}), RecordingTrainers(events), version=3)
    assert "continue" not in events


def test_a_failed_stream_leaves_the_engines_paused_and_the_session_open():
    events = []
    with pytest.raises(OSError):
        sync_weights(RecordingEngines(events, {}), RecordingTrainers(events, OSError("rank 3 died")), version=1)
    assert events == ["pause", "flush", "begin 1", "stream 1"]


def test_an_engine_that_was_lost_is_named_and_the_others_stay_paused():
    events = []
    with pytest.raises(RuntimeError, match=r"lost while weights v4 were sent: decode-1: nobody is there"):
        trainers = RecordingTrainers(events, lost=("decode-1: nobody is there",))
        sync_weights(RecordingEngines(events, {"d": "4"}), trainers, version=4)
    assert events == ["pause", "flush", "begin 4", "stream 4"]


def test_weights_are_read_back_only_when_asked_and_before_any_engine_continues():
    events = []
    sync_weights(RecordingEngines(events, {"d": "7"}), RecordingTrainers(events), version=7, read_back=True)
    assert events[-4:] == ["end 7", "check", "read back 7", "continue"]


def test_an_engine_that_holds_other_weights_keeps_all_paused():
    events = []
    with pytest.raises(RuntimeError, match="lm_head differs"):
        trainers = RecordingTrainers(events, differs="lm_head differs")
        sync_weights(RecordingEngines(events, {"d": "7"}), trainers, version=7, read_back=True)
    assert events[-1] == "read back 7"


def test_who_gives_nothing_back_must_hold_the_same_after_a_second_stream():
    events, sums = [], [{"w": "1", "x": "2"}, {"w": "3", "x": "2"}]
    engines = RecordingEngines(events, {"d": "7"}, [sums, sums])
    sync_weights(engines, RecordingTrainers(events, silent=["d"]), version=7, read_back=True)
    stream = ["begin 7", "stream 7", "end 7", "check"]
    assert events == ["pause", "flush", *stream, "read back 7", "checksums d", *stream, "checksums d", "continue"]


def test_a_parameter_that_a_second_stream_changes_is_named_with_its_rank_and_no_engine_continues():
    events = []
    sums = [[{"w": "1", "x": "2"}, {"w": "3", "x": "2"}], [{"w": "1", "x": "2"}, {"w": "4", "x": "2"}]]
    with pytest.raises(RuntimeError, match=r"d does not hold weights v7 .*1 of 2 parameters changed .*: w \(rank 1\);"):
        engines = RecordingEngines(events, {"d": "7"}, sums)
        sync_weights(engines, RecordingTrainers(events, silent=["d"]), version=7, read_back=True)
    assert events[-1] == "checksums d"


def test_what_was_published_is_loaded_by_the_engines_before_the_update_ends():
    events = []
    sync_weights(RecordingEngines(events, {"d": "7"}), RecordingTrainers(events, published="/w/weight_v000007"), version=7)
    assert events[2:5] == ["begin 7", "stream 7", "load 7 from /w/weight_v000007"] and events[5] == "end 7"


def test_phases_are_those_of_the_slowest_ranks():
    found = StreamSeconds.slowest([StreamSeconds(3.0, 0.5, 0.0), StreamSeconds(1.0, 2.0, 0.25)])
    assert found == StreamSeconds(make=3.0, exchange=2.0, hand_over=0.25)
    assert str(found) == "make 3.00 s, exchange 2.00 s, hand over 0.25 s"
    assert StreamSeconds.slowest([]) == StreamSeconds()
