"""Main memory of snapshots for restarts, by hand for GLM-5.2 on 32 nodes, and whose copies lie where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from slime.rehearse.checks.memory import PEERS, SNAPSHOTS
from slime.rehearse.result import Options, Rehearsal, rehearse
from slime.training.copies import copy_places
from tests.rehearse.edits import flags
from tests.rehearse.recipes import Recipe

OPTIONS = Options(build_ranks=False, curves=False)


def done(recipe: Recipe, folder: Path, *words: str) -> Rehearsal:
    edited = flags(*words)(recipe)
    return rehearse(edited.written(folder), replace(OPTIONS, env=edited.env))


def test_the_recipes_snapshots_are_in_the_plan_and_refused_where_they_do_not_fit(flagship: Recipe, tmp_path: Path) -> None:
    plain = done(flagship, tmp_path)
    assert SNAPSHOTS not in plain.budget.node.rollout
    # A snapshot is what the optimizer keeps, all of it in main memory here: 12 bytes of every trained parameter, and the frozen
    # indexers in bf16. The last stage's four nodes hold 479 GB of it, the middle ones half as much.
    optimizer = plain.budget.node.rollout["optimizer"]
    for words, own, other in (
        (("--snapshot-interval", "1"), 2, 2),
        (("--snapshot-interval", "5", "--no-snapshot-peer"), 2, 0),
        (("--snapshot-interval", "5", "--snapshot-versions", "1"), 1, 1),
    ):
        found = done(flagship, tmp_path, *words)
        for parts in (found.budget.node.rollout, found.budget.node.checkpoint):
            assert parts[SNAPSHOTS] == pytest.approx(own * optimizer, rel=0.002)
            assert parts.get(PEERS, 0) == pytest.approx(other * optimizer / 2, rel=0.01)
        node = sum(found.budget.node.rollout.values()) / 1e9
        wrong = [line for line in found.findings.of("violation") if "of main memory" in line.what]
        assert bool(wrong) == (node > 2000) == (words == ("--snapshot-interval", "1")), node
        if wrong:
            assert wrong[0].fix.startswith("--snapshot-versions 1, leave the copies on other nodes out (--no-snapshot-peer)")


def test_the_copies_of_full_nodes_lie_on_those_that_hold_less() -> None:
    assert copy_places([5, 5]) == [1, 0]
    assert copy_places([9, 1, 1, 9]) == [1, 0, 3, 2]
    for sizes in ([3, 2, 1], [1] * 5, [7, 1, 4, 4, 2, 9]):
        places = copy_places(sizes)
        assert sorted(places) == list(range(len(sizes))) and all(place != node for node, place in enumerate(places))
