"""The data source: every prompt once per epoch, and a restored one goes on exactly where the saved one was."""

from __future__ import annotations

import json
import pickle
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_helpers import make_config

from slime.rollout.data_source import RolloutDataSource, RolloutDataSourceWithBuffer, state_path
from slime.types.sample import Status

NUM_PROMPTS = 7


@pytest.fixture(scope="module")
def source_of(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "p.jsonl"
    path.write_text("".join(json.dumps({"input": f"q{i}"}) + "\n" for i in range(NUM_PROMPTS)))

    def build(cls=RolloutDataSourceWithBuffer, **values):
        values = {"prompt_data": str(path), "n_samples_per_prompt": 2, "rollout_shuffle": True, "rollout_seed": 5} | values
        return cls(make_config(**values).args)

    return build


def prompts_of(groups):
    return [group[0].prompt for group in groups]


@settings(max_examples=40, deadline=None)
@given(requests=st.lists(st.integers(0, 3 * NUM_PROMPTS), max_size=5), shuffle=st.booleans())
def test_every_prompt_comes_once_per_epoch_however_it_is_asked_for(source_of, requests, shuffle):
    source = source_of(RolloutDataSource, rollout_shuffle=shuffle)
    taken = []
    for count in requests:
        groups = source.get_samples(count)
        assert len(groups) == count  # also when one request spans several epochs
        taken += groups
    names = prompts_of(taken)
    for start in range(0, len(names), NUM_PROMPTS):
        epoch = Counter(names[start : start + NUM_PROMPTS])
        assert max(epoch.values(), default=1) == 1
    indices = [sample.index for group in taken for sample in group]
    assert indices == list(range(2 * len(taken)))
    assert [group[0].group_index for group in taken] == list(range(len(taken)))


def test_epochs_are_shuffled_differently_and_reproducibly(source_of):
    names = prompts_of(source_of().get_samples(3 * NUM_PROMPTS))
    epochs = [tuple(names[i : i + NUM_PROMPTS]) for i in range(0, len(names), NUM_PROMPTS)]
    assert len(set(epochs)) == 3
    assert names == prompts_of(source_of().get_samples(3 * NUM_PROMPTS))
    assert names != prompts_of(source_of(rollout_seed=6).get_samples(3 * NUM_PROMPTS))


@settings(max_examples=25, deadline=None)
@given(before=st.integers(0, 20), put_back=st.integers(0, 3), after=st.integers(1, 20))
def test_a_restored_source_gives_what_the_saved_one_would_have_given(source_of, before, put_back, after):
    source = source_of()
    groups = source.get_samples(before)
    for group in groups[:put_back]:
        group[0].tokens, group[0].response_length, group[0].status = [1, 2, 3], 1, Status.ABORTED
    source.add_samples(groups[:put_back])
    state = pickle.loads(pickle.dumps(source.state_dict()))
    restored = source_of()
    restored.load_state_dict(state)
    wanted, found = source.get_samples(after), restored.get_samples(after)
    assert [[s.to_dict() for s in g] for g in found] == [[s.to_dict() for s in g] for g in wanted]


def test_a_saved_state_does_not_change_with_the_source(source_of):
    source = source_of()
    groups = source.get_samples(2)
    source.add_samples(groups)
    source.metadata["seen"] = [1]
    state = source.state_dict()
    groups[0][0].tokens.append(99)
    source.metadata["seen"].append(2)
    source.get_samples(5)
    assert len(state["buffer"]) == 2 and state["buffer"][0][0]["tokens"] == [] and state["metadata"] == {"seen": [1]}


def test_the_buffer_comes_first_and_takes_whole_groups_only(source_of):
    source = source_of()
    first, second, third = source.get_samples(3)
    source.add_samples([first, third])
    again = source.get_samples(3)
    assert again[:2] == [first, third] and again[2][0].group_index == 3
    with pytest.raises(ValueError, match="has 1 samples, --n-samples-per-prompt is 2"):
        source.add_samples([second[:1]])


@pytest.mark.parametrize("resumed_with", [1, 2, 4])
def test_groups_of_the_buffer_have_the_size_that_a_resumed_run_asks_for(source_of, resumed_with, caplog):
    """Saved with two per prompt, one of them begun: it is what remains of a smaller group, and a larger one gets fresh ones."""
    source = source_of()
    groups = source.get_samples(3)
    for group in groups[:2]:
        begun = group[1]
        begun.tokens, begun.response_length, begun.status, begun.response = [7, 8, 9], 2, Status.ABORTED, "ab"
        begun.rollout_log_probs, begun.metadata["start_rollout_id"] = [-1.0, -2.0], 5
    source.add_samples(groups[:2])
    resumed = source_of(n_samples_per_prompt=resumed_with)
    with caplog.at_level("WARNING"):
        resumed.load_state_dict(source.state_dict())
    found = resumed.get_samples(3)
    assert [len(group) for group in found] == [resumed_with] * 3
    assert prompts_of(found)[:2] == prompts_of(groups)[:2]
    for group, saved in zip(found[:2], groups[:2], strict=True):
        assert {sample.prompt for sample in group} == {saved[0].prompt}
        assert {sample.group_index for sample in group} == {saved[0].group_index}
        assert sorted(sample.response_length for sample in group) == sorted([0, 0, 0, 2][-resumed_with:])
        fresh = [sample for sample in group if not sample.response_length]
        assert all(sample.tokens == [] and sample.status is Status.PENDING for sample in fresh)
    indices = [sample.index for group in found for sample in group]
    assert len(set(indices)) == len(indices)
    said = {1: "0 fresh samples added, 2 removed", 4: "4 fresh samples added, 0 removed"}
    assert ("the buffer's 2 groups of 2 samples" in caplog.text) == (resumed_with != 2)
    assert said.get(resumed_with, "") in caplog.text


def newest_first(args, rollout_id, buffer, num_samples):
    taken = buffer[::-1][:num_samples]
    del buffer[-len(taken) :]
    return taken


def test_a_buffer_filter_chooses_from_the_buffer(source_of):
    source = source_of(buffer_filter_path=f"{__name__}.newest_first")
    groups = source.get_samples(3)
    source.add_samples(groups)
    assert source.get_samples(2) == [groups[2], groups[1]]
    assert source.buffer == [groups[0]]


def test_save_and_load_use_slimes_file_and_a_first_run_starts_at_the_beginning(source_of, tmp_path):
    source = source_of(save=str(tmp_path))
    source.get_samples(9)
    source.save(4)
    assert state_path(str(tmp_path), 4).name == "global_dataset_state_dict_4.pt"
    assert [path.name for path in (tmp_path / "rollout").iterdir()] == ["global_dataset_state_dict_4.pt"]
    restored = source_of(load=str(tmp_path), start_rollout_id=5)
    restored.load()
    assert prompts_of(restored.get_samples(4)) == prompts_of(source.get_samples(4))
    fresh = source_of(load=str(tmp_path / "nothing"))
    fresh.load(3)
    assert fresh.sample_index == 0


def test_a_run_that_only_evaluates_needs_no_prompts():
    assert len(RolloutDataSource(make_config(num_rollout=0).args)) == 0


def test_without_prompts_the_flag_is_named():
    with pytest.raises(ValueError, match="--prompt-data"):
        RolloutDataSource(make_config().args)
    source = RolloutDataSource(make_config(rollout_global_dataset=False, n_samples_per_prompt=3).args)
    assert [len(group) for group in source.get_samples(2)] == [3, 3]
