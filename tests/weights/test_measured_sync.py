"""The bench of one sync: what stands in the place of an engine, and how its numbers are read."""

from __future__ import annotations

import re

import pytest
import torch
from by_hand import by_hand

from slime.device.host import HostDevice
from slime.engine.payload import bucket_payload
from slime.weights.buckets import pack_bucket
from tools.bench.measured_sync import Setup, Way, read_results
from tools.bench.taker import load_bucket
from tools.bench.weight_sync import main


def test_what_stands_in_the_place_of_an_engine_holds_what_it_was_given_last():
    own: dict[str, torch.Tensor] = {}
    first = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}
    second = {"a": first["a"] * 2, "c": torch.zeros(1, dtype=torch.uint8)}
    for named in (first, second):
        load_bucket(bucket_payload(pack_bucket(list(named.items())), HostDevice()), own)
    assert list(own) == ["a", "b", "c"]
    assert all(torch.equal(own[name], tensor) for name, tensor in {**first, **second}.items())


def seconds(whole: float, make: float, exchange: float, hand_over: float) -> dict[str, float]:
    return {"seconds": whole, "make": make, "exchange": exchange, "hand_over": hand_over}


def test_numbers_are_medians_of_the_slowest_rank_without_the_first_sync():
    setup = Setup("", "", "", (), trainers=2, engine=2, apart=1, experts_apart=False, limit_bytes=1, repeats=3)
    warm = seconds(90, 90, 90, 90)
    common = {"size": [[3000, 7], 4, 2000], "apart size": [[3000, 7], 2, 2500], "broadcast": [9.0, 1.0, 3.0, 2.0]}
    ranks = [
        {
            "shared": [warm, seconds(1, 0.1, 0.2, 0.3), seconds(3, 0.5, 0.1, 0.3), seconds(2, 0.2, 0.1, 0.3)],
            "split": [{"export": 1.0, "quantise": 2.0}],
            "apart": [warm, *[seconds(2, 0.5, 1.0, 0)] * 3],
            **common,
        },
        {
            "shared": [warm, seconds(1, 0.3, 0.0, 0.4), seconds(3, 0.1, 0.1, 0.2), seconds(2, 0.1, 0.1, 0.3)],
            "split": [{"export": 0.5, "quantise": 3.0}],
            "apart": [warm, *[seconds(2, 0.4, 1.5, 0)] * 3],
            **common,
        },
        {"received": [warm, *[{"make": 0.0, "exchange": 1.2, "hand_over": 0.25}] * 3]},
    ]
    found = read_results(ranks, setup)
    assert found.shared == Way(seconds=2, make=0.3, exchange=0.1, hand_over=0.3)
    assert found.apart == Way(seconds=2, make=0.5, exchange=1.5, hand_over=0.25)
    assert (found.nbytes, found.rounds, found.taken, found.taken_apart) == (3000, 4, 2000, 2500)
    assert found.export_share == pytest.approx(0.25) and found.broadcast_seconds == 2.0


@by_hand("a minute")
def test_a_tiny_model_is_measured_by_every_way(capsys):
    main(["measure", "--apart", "1", "--repeats", "1", "--buffer", "500000"])
    said = capsys.readouterr().out
    for way in ("2 ranks on the trainer's devices (no SGLang)", "1 ranks elsewhere, by receivers (no SGLang)"):
        (line,) = (line for line in said.splitlines() if line.startswith(way))
        numbers = [float(word) for word in re.findall(r"\d+\.\d+", line)]
        whole, _, export, quantise, wire, load, engine = numbers
        assert engine == 0.0, "no SGLang"
        assert 0 < max(export + quantise, wire, load) <= whole + 0.001 and min(numbers) >= 0, line
    assert "plain broadcast of one copy to 1 ranks" in said
