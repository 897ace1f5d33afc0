"""The table of tools/bench/dsa_ops.py: floors, goals and JSON of made-up rows, and the peers' names across their versions."""

import json
import types

import pytest
import torch

from tools.bench import dsa_ops, dsa_table
from tools.bench.dsa_table import Row, Table


def table(**more):
    """On a machine that copies 4 TB/s and multiplies at 800 TFLOP/s."""
    rows = [
        Row(*dsa_table.COPY, 2.0, bytes=8e9),
        Row(*dsa_table.PRODUCT, 1.25, flops=1e12),
        Row(dsa_table.FORWARD, "FlashMLA kernel", 1.0, flops=0.4e12, bytes=4e8),
        Row(dsa_table.FORWARD, "as chosen", more.get("chosen", 1.0), flops=0.4e12, bytes=4e8),
        Row(dsa_table.BACKWARD, "cuDNN front-end", None, note="ImportError: none"),
        Row(dsa_table.INDEXER, "ours FP8", 1.6, flops=1.6e12, fp8=True),
        Row(dsa_table.INDEXER, "ours bf16", 2.0, flops=1.6e12),
        Row(dsa_table.MILLION, "ours bf16", 53.0, flops=25.6e12, extra_bytes=3e8),
        Row("block FP8, 2.1 GB", "ours", 1.0, bytes=2.9e9),
        Row(dsa_table.LOG_PROB, "ours, forward + backward", 49.0, flops=24e12, bytes=1e9, extra_bytes=1.2e9),
    ]
    return Table(rows, "a machine")


def test_floors_take_the_limits_of_the_same_run_and_fp8_products_twice_the_rate():
    made = table()
    assert (made.copy_tb_s, made.bf16_tflops) == (4.0, 800.0)
    assert made.floors(made.rows[2]) == pytest.approx((0.5, 0.1))
    assert made.floors(made.rows[5]) == pytest.approx((1.0, 0.0)) and made.floors(made.rows[6])[0] == pytest.approx(2.0)
    alone = Table(made.rows[2:], "a machine")
    assert (alone.copy_tb_s, alone.bf16_tflops) == (4.25, 784.0)
    assert "another H200" in alone.lines()[1] and "measured in this run" in made.lines()[1]


def test_goals_compare_with_the_peer_or_the_limit_of_the_run():
    reached = {(g.operator, g.text): g.result(table()) for g in dsa_table.GOALS}
    assert len(reached) == len(dsa_table.GOALS)
    told = {key: (r["allowed"], r["reached"]) for key, r in reached.items() if r["measured"] is not None}
    assert told == {
        (dsa_table.FORWARD, "<= FlashMLA's kernel"): (1.0, True),
        (dsa_table.INDEXER, "FP8 scores and top-k <= 1.5 ms"): (1.5, False),
        (dsa_table.INDEXER, "bf16 scores and top-k <= 3 ms"): (3.0, True),
        (dsa_table.MILLION, "bf16, >= 60 % of the rate per key at 65,536"): (pytest.approx(2.0 * 16 / 0.6), True),  # 53.3 ms
        (dsa_table.MILLION, "memory: 1/16 of all scores, in GB"): (pytest.approx(0.537, abs=1e-3), True),
        ("block FP8, 2.1 GB", ">= 70 % of the copy"): (pytest.approx(2.9 / 2.8), True),
        (dsa_table.LOG_PROB, ">= 60 % of the dense product"): (pytest.approx(24 / 0.48), True),
        (dsa_table.LOG_PROB, "memory: < 1 GB beyond the gradients"): (1.0, False),
    }
    slower = [g.result(table(chosen=1.01)) for g in dsa_table.GOALS][0]
    assert slower["reached"] is False


def test_a_recorded_file_prints_the_same_table(tmp_path, capsys):
    made = table()
    (tmp_path / "run.json").write_text(made.to_json())
    dsa_table.main([str(tmp_path / "run.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines == made.lines()
    forward = next(line for line in lines if "as chosen" in line)
    assert forward.split()[-5:] == ["1.000", "400", "0.40", "0.500", "50%"]
    absent = next(line for line in lines if "cuDNN" in line)
    assert absent.split()[-3:] == ["-", "ImportError:", "none"]
    stored = json.loads(made.to_json())
    assert stored["limits"]["measured"] and stored["rows"][2]["floor_flops_ms"] == pytest.approx(0.5)
    assert [g["reached"] for g in stored["goals"]].count(None) == 4


def test_the_indexers_peer_is_called_by_the_name_that_its_version_has():
    inputs = ("q", ("k", "scale"), "gates", "starts", "ends")
    older = types.SimpleNamespace(
        fp8_mqa_logits=lambda q, k, w, ks, ke, clean_logits=True, max_seqlen_k=0: (q, k, clean_logits)
    )
    assert dsa_ops.deep_gemm_scores(older)(*inputs, 64) == ("q", ("k", "scale"), False)
    newer = types.SimpleNamespace(fp8_fp4_mqa_logits=lambda q, k, w, start, end, max_seqlen_k, schedule_meta=None: max_seqlen_k)
    assert dsa_ops.deep_gemm_scores(newer)(*inputs, 64) == 64


def test_without_a_cuda_device_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dsa_ops.main(["--only", "limits"]) == 1
    assert "no CUDA device" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        dsa_ops.arguments(["--only", "nothing"])
