"""A rollout on disk: what is replayed trains exactly as what was generated; a wrong file is one clear error."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from rollout_helpers import make_config

from slime.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput
from slime.rollout.dumps import Replay, dump_path, save_evaluation, save_rollout
from slime.rollout.to_batch import make_rollout_batch
from slime.types.sample import Sample, Status


def sample(index: int, *, group: int, reward: float, **values) -> Sample:
    length = 2 + index % 3
    return Sample(
        index=index, group_index=group, tokens=list(range(10 + index + length)), response_length=length, reward=reward,
        status=Status.TRUNCATED if index % 2 else Status.COMPLETED, rollout_log_probs=[-0.1 * index] * length,
        loss_mask=[1] * (length - 1) + [index % 2], weight_versions=[str(index)], metadata={"n": index}, **values,
    )  # fmt: skip


def two_groups() -> RolloutFnTrainOutput:
    """The second group fans out: its first trajectory has two samples."""
    fan = [sample(2, group=1, reward=0.5, rollout_id=7), sample(3, group=1, reward=1.0, rollout_id=7)]
    groups = [
        [sample(0, group=0, reward=1.0), sample(1, group=0, reward=0.0)],
        [fan, sample(4, group=1, reward=0.25, rollout_routed_experts=np.arange(12, dtype=np.int32).reshape(3, 2, 2))],
    ]
    return RolloutFnTrainOutput(samples=groups, metrics={"perf/rollout_time": 2.5})


def same(a, b) -> bool:
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


def test_a_replayed_rollout_is_the_batch_that_was_generated(tmp_path):
    template, output, config = str(tmp_path / "deep" / "{rollout_id}.pt"), two_groups(), make_config()
    save_rollout(template, 3, output, data_state={"sample_offset": 6})
    replay = Replay(template)
    again = replay.rollout(3)
    before, after = (make_rollout_batch(value.samples, rollout_id=3, config=config) for value in (output, again))
    differing = [
        item.name for item in dataclasses.fields(before) if not same(getattr(before, item.name), getattr(after, item.name))
    ]
    assert differing == []
    assert after.groups.tolist() == [0, 0, 1, 1, 1] and after.trajectories[2] == after.trajectories[3]
    assert again.samples[1][0][1].metadata == {"n": 3} and again.metrics == {"perf/rollout_time": 2.5}
    assert again.samples[1][1].rollout_routed_experts.tolist() == output.samples[1][1].rollout_routed_experts.tolist()
    assert replay.data_state == {"sample_offset": 6}
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["3.pt"]


def test_a_file_without_our_extras_is_grouped_by_group_index(tmp_path):
    rows = [sample(i, group=group, reward=0.0).to_dict() for i, group in enumerate((5, 5, 9, 9, 5))]
    torch.save({"rollout_id": 0, "samples": rows}, tmp_path / "0.pt")
    replay = Replay(str(tmp_path / "{rollout_id}.pt"))
    groups = replay.rollout(0).samples
    assert [[item.index for item in group] for group in groups] == [[0, 1, 4], [2, 3]]
    assert replay.data_state is None


@pytest.mark.parametrize("share, kept", [(1.0, [0, 1, 2, 3, 4]), (0.6, [0, 1, 4]), (0.4, [0, 4]), (0.01, [0])])
def test_a_share_of_a_dump_is_its_first_and_last_groups(tmp_path, share, kept):
    rows = [sample(index, group=index // 2, reward=0.0).to_dict() for index in range(10)]
    torch.save({"rollout_id": 0, "samples": rows}, tmp_path / "0.pt")
    groups = Replay(str(tmp_path / "{rollout_id}.pt"), share=share).rollout(0).samples
    assert [[item.index for item in group] for group in groups] == [[2 * group, 2 * group + 1] for group in kept]


def test_an_evaluation_is_kept_beside_the_rollouts(tmp_path):
    template = str(tmp_path / "{rollout_id}.pt")
    own = [sample(0, group=0, reward=1.0), sample(1, group=0, reward=0.0)]
    output = RolloutFnEvalOutput(data={"add": {"rewards": [1.0, 0.0], "samples": own}, "empty": {"rewards": []}})
    path = save_evaluation(template, 4, output)
    assert path == dump_path(template, 4, evaluation=True) == tmp_path / "eval_4.pt"
    content = torch.load(path, weights_only=False)
    assert content["rollout_id"] == 4 and [Sample.from_dict(row).index for row in content["samples"]] == [0, 1]
    assert content["data_sets"]["add"] == {"num_samples": 2, "rewards": [1.0, 0.0]}
    assert content["data_sets"]["empty"] == {"num_samples": 0, "rewards": []}


def renamed(folder):
    save_rollout(str(folder / "{rollout_id}.pt"), 8, two_groups(), data_state=None)
    (folder / "8.pt").rename(folder / "2.pt")


def torn(folder):
    save_rollout(str(folder / "{rollout_id}.pt"), 2, two_groups(), data_state=None)
    (folder / "2.pt").write_bytes((folder / "2.pt").read_bytes()[:500])


def without_groups(folder):
    torch.save({"rollout_id": 2, "samples": [Sample(tokens=[1, 2], response_length=1).to_dict()]}, folder / "2.pt")


def with_a_broken_sample(folder):
    rows = [sample(0, group=0, reward=0.0).to_dict() | {"response_length": 99}]
    torch.save({"rollout_id": 2, "samples": rows}, folder / "2.pt")


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda folder: (folder / "0.pt").write_text(""), r"there is no .*2\.pt; .* holds 1 files: 0\.pt"),
        (lambda folder: None, r"there is no .*2\.pt; .* holds no file"),
        (lambda folder: (folder / "2.pt").write_text("hello"), r"2\.pt cannot be read"),
        (torn, r"2\.pt cannot be read"),
        (lambda folder: torch.save({"weights": 1}, folder / "2.pt"), r"2\.pt is no rollout dump; .* found \['weights'\]"),
        (lambda folder: torch.save([1], folder / "2.pt"), r"2\.pt is no rollout dump; .* found a list"),
        (renamed, r"2\.pt holds rollout 8, wanted is 2"),
        (without_groups, r"sample 0 has no group_index"),
        (with_a_broken_sample, r"2\.pt, sample 0: .*response_length is 99"),
    ],
)
def test_a_missing_or_foreign_file_is_one_clear_error(tmp_path, make, said):
    make(tmp_path)
    with pytest.raises(ValueError, match=said) as caught:
        Replay(str(tmp_path / "{rollout_id}.pt")).rollout(2)
    assert len(str(caught.value).splitlines()) == 1


def test_a_dump_that_cannot_be_written_names_its_file_and_leaves_no_half_of_it(tmp_path):
    (tmp_path / "taken").write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"rollout dump .*taken/1\.pt cannot be written"):
        save_rollout(str(tmp_path / "taken" / "{rollout_id}.pt"), 1, two_groups(), data_state=None)
    output = two_groups()
    output.samples[0][1].metadata["not picklable"] = lambda: None
    with pytest.raises(OSError, match=r"rollout dump .*/1\.pt cannot be written \(.*lambda"):
        save_rollout(str(tmp_path / "{rollout_id}.pt"), 1, output, data_state=None)
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]
