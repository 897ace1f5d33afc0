"""tools/bench/rollout_scale.py: the token ids are copied once into a column and once into a stream."""

from __future__ import annotations

from tools.bench.rollout_scale import measure_copies, measure_samples


def test_a_long_batch_is_copied_twice_and_nothing_of_its_size_is_held_meanwhile() -> None:
    """Columns: ids of 8 bytes, masks and log-probs of 4. A micro-batch: ids, positions, two targets, two kinds of rows and
    segments of 8, mask and weight of 4 (log-probs are PyTorch's)."""
    found = measure_copies(4, 16_384)
    kept, peak = found["samples to columns"]
    assert 1.9 < kept < 2.2 and peak - kept < 0.1
    kept, peak = found["columns to micro-batches"]
    assert 7.5 < kept < 8.6 and peak - kept < 1.0, "beside one sample of the four, four of its columns"


def test_every_stage_of_many_samples_is_measured() -> None:
    assert set(measure_samples(256, dp_size=4)) == {"filter", "metrics", "columns", "plan", "plan, even work", "pack"}
