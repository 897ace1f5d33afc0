"""Where prompts come from, and what samples become."""

from __future__ import annotations

import numpy as np

from slime.rollout.data_source import has_a_state
from slime.rollout.to_batch import make_rollout_batch
from slime.types.sample import Sample


def gives_groups_of_the_asked_size(source, stage) -> None:
    made = source(stage.args())
    groups = made.get_samples(3)
    assert len(groups) == 3, f"get_samples(3) gave {len(groups)} groups"
    sizes = [len(group) for group in groups]
    assert sizes == [2, 2, 2], f"groups have {sizes} samples with --n-samples-per-prompt 2"
    assert all(isinstance(sample, Sample) for group in groups for sample in group), "a group holds something else than Samples"


def gives_back_what_it_was_given(source, stage) -> None:
    made = source(stage.args())
    groups = made.get_samples(2)
    made.add_samples(groups)
    again = made.get_samples(2)
    ours, theirs = ([sample.prompt for group in each for sample in group] for each in (groups, again))
    assert ours == theirs, "after add_samples(groups) it gives other prompts: what was put back is lost"


def goes_on_from_its_state(source, stage) -> None:
    if not has_a_state(source):
        return
    first, second = source(stage.args()), source(stage.args())
    first.get_samples(3)
    second.load_state_dict(first.state_dict())
    wanted, found = ([group[0].prompt for group in one.get_samples(4)] for one in (first, second))
    assert wanted == found, f"after load_state_dict it goes on with {str(found)[:80]}; the other with {str(wanted)[:80]}"


def says_how_long_an_epoch_is(source, stage) -> None:
    length = len(source(stage.args()))
    assert length > 0, f"len() is {length}"


def gives_columns_of_one_length(function, stage) -> None:
    samples = [[*stage.group([0.0, 1.0])], [*stage.group([1.0, 0.0], of=1)]]
    path = f"{function.__module__}.{function.__qualname__}"
    batch = make_rollout_batch(samples, rollout_id=0, config=stage.config(custom_convert_samples_to_train_data_path=path))
    assert np.isfinite(batch.rewards).all(), f"rewards are {batch.rewards.tolist()}; expected finite numbers"


PROMISES = {
    "--data-source-path": (
        gives_groups_of_the_asked_size,
        gives_back_what_it_was_given,
        goes_on_from_its_state,
        says_how_long_an_epoch_is,
    ),
    "--custom-convert-samples-to-train-data-path": (gives_columns_of_one_length,),
}
