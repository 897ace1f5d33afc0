"""The soak's arithmetic: a straight line by hand, what counts as growth, and a process that really holds more and more."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tools.drills.scene import look_at
from tools.soak import BOUNDS, Sample, line_through, markdown, sample, slopes


def test_the_slope_and_its_error_are_those_of_least_squares_by_hand():
    # Residuals of y = x + 0.5 are -0.5, 0.5, 0.5, -0.5: error = sqrt(1 / 2 / 5).
    found = line_through([(0, 0), (1, 2), (2, 3), (3, 3)])
    assert (found.first, found.last, found.per_rollout) == (0, 3, 1.0)
    assert found.error == pytest.approx((1 / 2 / 5) ** 0.5)
    with pytest.raises(ValueError, match="2 samples"):
        line_through([(0, 0), (1, 2)])


def held(rollouts: int, rss: int, descriptors: int = 10, pid: int = 7) -> Sample:
    return Sample(rollouts, pid, "ray::TrainActor", rss, descriptors, 5)


def test_what_grows_steadily_leaks_and_what_starts_up_or_wobbles_does_not():
    grows = slopes([held(n, 1000 + 100 * n) for n in range(60)])["ray::TrainActor", 7]
    assert [measure for measure, slope in grows.items() if slope.leaks(BOUNDS[measure])] == ["rss_kb"]
    warms = slopes([held(n, 1000 * min(n, 15), descriptors=min(n, 15)) for n in range(60)])["ray::TrainActor", 7]
    assert not any(slope.leaks(BOUNDS[measure]) for measure, slope in warms.items())
    wobbles = slopes([held(n, 1000 + 300 * (n % 2) + 5 * n) for n in range(60)])["ray::TrainActor", 7]
    assert wobbles["rss_kb"].per_rollout > BOUNDS["rss_kb"] and not wobbles["rss_kb"].leaks(BOUNDS["rss_kb"])
    assert slopes([held(n, 1000, pid=n) for n in range(60)]) == {}, "each was seen once"


def test_the_table_says_who_grows():
    text = markdown(slopes([held(n, 1024 * n, descriptors=n) for n in range(60)]), 59)
    assert "| ray::TrainActor | 20 -> 59 | +100.00 ± 0.00 | 20 -> 59 | 5 -> 5 | rss_kb, descriptors |" in text


HOLDER = """
import os, sys
kept = []
for _ in sys.stdin:
    kept.append((bytearray(os.urandom(1 << 20)), os.open("/dev/null", os.O_RDONLY)))
    print(flush=True)
"""


def test_a_real_process_is_measured():
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        samples = []
        for number in range(20):
            process.stdin.write("\n")
            process.stdin.flush()
            process.stdout.readline()
            samples += sample([look_at(process.pid)], number)
        process.stdin.close()
    ((_, measures),) = slopes(samples).items()
    assert measures["descriptors"].per_rollout == pytest.approx(1.0)
    assert measures["rss_kb"].per_rollout == pytest.approx(1024, rel=0.1)
    assert measures["threads"].per_rollout == 0.0
