import math

import pytest
import torch

from slime.weights.read_back import TENSOR_VALUES, Expected, ReadBack, answered, compare, read_back


def all_answered(answers):
    return {name: answered(answer) for name, answer in answers.items()}


def test_fp8_is_expected_as_codes_times_scales_and_everything_else_as_sent():
    # Two tiles of 2 x 2 above each other; e4m3 holds all of these codes exactly.
    codes = torch.tensor([[1.0, -2.0], [0.5, 4.0], [8.0, 1.0]]).to(torch.float8_e4m3fn)
    scales = torch.tensor([[2.0], [0.25]])
    norm = torch.tensor([1.0, 0.1]).bfloat16()
    expected = Expected(block=2)
    expected.add([("a.weight", codes), ("a.weight_scale_inv", scales), ("norm.weight", norm)])
    assert expected.sent == 2 and set(expected.values) == {"a.weight", "norm.weight"}
    assert expected.values["a.weight"].tolist() == [[2.0, -4.0], [1.0, 8.0], [2.0, 0.25]]
    assert expected.values["norm.weight"].tolist() == [1.0, 0.10009765625]


def test_the_leading_rows_of_a_large_tensor_are_expected_and_kept_apart_from_the_bucket():
    large = torch.arange(2 * TENSOR_VALUES, dtype=torch.float32).view(-1, 1024)
    expected = Expected(block=1)
    expected.add([("large", large)])
    large[0, 0] = 7.0
    kept = expected.values["large"]
    assert kept.shape == (TENSOR_VALUES // 1024, 1024)
    assert kept[0, 0] == 0.0 and kept[-1, -1] == TENSOR_VALUES - 1


def test_every_difference_is_named_with_its_size_the_worst_first():
    want = {name: torch.tensor([[1.0, 2.0], [3.0, 4.0]]) for name in ("same", "off", "worse", "nan", "shape")}
    answers = {
        "same": [[1.0, 2.0], [3.0, 4.0]],
        "off": [[1.0, 2.0], [3.0, 4.25]],
        "worse": [[-1.0, 2.0], [3.0, 4.25]],
        "nan": [[1.0, None], [3.0, 4.0]],
        "shape": [[1.0, 2.0]],
    }
    found = compare(want, all_answered(answers), num_ranks=1)
    assert [item.name for item in found] == ["nan", "shape", "worse", "off"]
    assert math.isnan(found[0].largest) and [item.largest for item in found[1:]] == [math.inf, 2.0, 0.25]


def test_the_first_of_two_ranks_answers_with_its_rows_or_columns():
    want = {"rows": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "columns": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    assert compare(want, all_answered({"rows": [[1.0, 2.0]], "columns": [[1.0], [3.0]]}), num_ranks=2) == []
    found = compare(want, all_answered({"rows": [[3.0, 4.0]], "columns": [[1.0]]}), num_ranks=2)
    assert [item.name for item in found] == ["columns", "rows"]


def test_the_line_counts_what_was_compared_and_one_who_gave_nothing_back_is_not_complete():
    expected = Expected(block=1)
    expected.add([("a", torch.ones(2)), ("b", torch.ones(2))])
    both = all_answered({"a": [1.0, 1.0], "b": [1.0, 1.0]})
    found = read_back("decode-1", 3, expected, both, num_ranks=1)
    assert found == ReadBack("decode-1", "weights v3: 2 of 2 tensors read back equal from decode-1", complete=True)
    assert not read_back("decode-1", 3, expected, both, num_ranks=2).complete, "the second rank gave nothing"
    found = read_back("decode-1", 3, expected, all_answered({"a": [1.0, 1.0]}), num_ranks=1)
    line = "weights v3: 1 of 2 tensors read back equal from decode-1 (1 it cannot give back by name)"
    assert found == ReadBack("decode-1", line, complete=False)
    assert read_back("decode-1", 3, expected, {}, num_ranks=1) == ReadBack("decode-1", "", complete=False)
    with pytest.raises(RuntimeError, match=r"decode-1 .* weights v3 .*1 of 2 tensors differ: b \(largest difference 0.5\);"):
        read_back("decode-1", 3, expected, all_answered({"a": [1.0, 1.0], "b": [1.0, 1.5]}), num_ranks=1)


def test_leading_rows_alone_are_not_the_whole():
    expected = Expected(block=1)
    expected.add([("large", torch.ones(TENSOR_VALUES + 1, 1))])
    assert not read_back("e", 1, expected, {"large": torch.ones(TENSOR_VALUES, 1)}, num_ranks=1).complete
