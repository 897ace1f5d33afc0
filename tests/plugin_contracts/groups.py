"""What chooses among groups and samples."""

from __future__ import annotations

import copy

import numpy as np
from plugin_contracts import contract

from slime.rollout.base_types import flatten
from slime.rollout.filter_hub.base_types import DynamicFilterOutput
from slime.rollout.plugins import load_plugins
from slime.types.sample import Sample


def answers_for_groups_of_every_spread(function, stage) -> None:
    for rewards in ([0.0, 1.0], [0.0, 0.0], [1.0, 1.0], [-1.0, 0.5]):
        answer = function(stage.args(), stage.group(rewards))
        known = isinstance(answer, DynamicFilterOutput | bool | np.bool_)
        assert known, f"of rewards {rewards} it says {answer!r}; expected a DynamicFilterOutput or a truth value"


def decides_the_same_of_the_same_group(function, stage) -> None:
    first, second = (function(stage.args(), stage.group([0.0, 1.0])) for _ in range(2))
    assert first == second, f"of the same group it says {first!r} and then {second!r}"


def leaves_the_group_as_it_is(function, stage) -> None:
    group = stage.group([0.0, 1.0])
    before = [(sample.index, sample.reward, list(sample.tokens)) for sample in group]
    function(stage.args(), group)
    contract.unchanged("the group", before, [(sample.index, sample.reward, list(sample.tokens)) for sample in group])


def takes_what_it_gives_out_of_the_buffer(function, stage) -> None:
    for wanted in (1, 2, 5):
        buffer = [stage.group([0.0, 1.0], of=number) for number in range(3)]
        names = {id(group) for group in buffer}
        taken = function(stage.args(), 1, buffer, wanted)
        assert isinstance(taken, list), f"it gave a {type(taken).__name__}; expected a list of groups"
        assert len(taken) <= wanted, f"asked for {wanted} groups it gave {len(taken)}"
        twice = {id(group) for group in taken} & {id(group) for group in buffer}
        assert not twice, f"{len(twice)} groups that it gave are still in the buffer and would be trained twice"
        lost = names - {id(group) for group in [*taken, *buffer]}
        assert not lost, f"{len(lost)} groups are neither given nor in the buffer"


def marks_samples_and_removes_none(function, stage) -> None:
    groups = [stage.group([0.0, 1.0], of=number) for number in range(2)]
    before = copy.deepcopy([[sample.index for sample in group] for group in groups])
    answer = function(stage.args(), groups)
    assert answer is None, f"it gave a {type(answer).__name__}, which nobody reads; set sample.remove_sample"
    contract.unchanged("the groups", before, [[sample.index for sample in group] for group in groups])
    odd = [
        sample.remove_sample for group in groups for sample in group if not isinstance(sample.remove_sample, bool | np.bool_)
    ]
    assert not odd, f"remove_sample is {odd[0]!r}; expected True or False"


def sees_every_group_and_changes_no_number_of_them(function, stage) -> None:
    config = stage.config()
    source = load_plugins(config).data_source(stage.args(config))
    groups = [stage.group([0.0, 1.0], of=number) for number in range(3)]
    function(stage.args(config), groups, source)
    assert len(groups) == 3 and all(isinstance(sample, Sample) for sample in flatten(groups)), "it took groups away"


PROMISES = {
    "--dynamic-sampling-filter-path": (
        answers_for_groups_of_every_spread,
        decides_the_same_of_the_same_group,
        leaves_the_group_as_it_is,
    ),
    "--buffer-filter-path": (takes_what_it_gives_out_of_the_buffer,),
    "--rollout-sample-filter-path": (marks_samples_and_removes_none,),
    "--rollout-all-samples-process-path": (sees_every_group_and_changes_no_number_of_them,),
}
