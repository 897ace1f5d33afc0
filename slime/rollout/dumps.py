"""Rollouts on disk: --save-debug-rollout-data writes each, --load-debug-rollout-data trains on them again without engines.

A file is a mapping {"rollout_id", "samples": [Sample.to_dict()]}; `layout` (which samples form a group or a fan-out), `metrics`
and `data_state` (the data source's position after the rollout) go with it. A file without the last three, as slime writes it,
is replayed too: its groups are found by group_index.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slime.compat.pickles import load_values
from slime.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput, flatten
from slime.types.sample import Sample


def dump_path(template: str, rollout_id: int, *, evaluation: bool = False) -> Path:
    """`/d/{rollout_id}.pt` -> /d/7.pt, for an evaluation /d/eval_7.pt."""
    return Path(template.replace("{rollout_id}", f"{'eval_' if evaluation else ''}{rollout_id}"))


def save_rollout(template: str, rollout_id: int, output: RolloutFnTrainOutput, *, data_state: Mapping[str, Any] | None) -> Path:
    """Write one rollout, all of it or nothing. Raises OSError naming the file when it cannot be written."""
    samples = flatten(output.samples)
    positions = {id(sample): position for position, sample in enumerate(samples)}
    content = {
        "rollout_id": rollout_id,
        "samples": [sample.to_dict() for sample in samples],
        "layout": _replace_leaves(output.samples, lambda sample: positions[id(sample)]),
        "metrics": dict(output.metrics or {}),
        "data_state": data_state,
    }
    return _write(dump_path(template, rollout_id), content)


def save_evaluation(template: str, rollout_id: int, output: RolloutFnEvalOutput) -> Path:
    """Write the samples of all evaluation data sets; `data_sets` has per name the rewards and the number of its samples."""
    samples = {name: flatten(result.get("samples") or []) for name, result in output.data.items()}
    content = {
        "rollout_id": rollout_id,
        "samples": [sample.to_dict() for own in samples.values() for sample in own],
        "data_sets": {
            name: {"num_samples": len(samples[name]), "rewards": list(result["rewards"])}
            for name, result in output.data.items()
        },
    }
    return _write(dump_path(template, rollout_id, evaluation=True), content)


class Replay:
    """Dumps in the place of generation: one file per rollout."""

    def __init__(self, template: str, *, share: float | None = None):
        """share: of every file only the first and the last half of so many groups, share times all, at least one."""
        self._template, self._share = template, share
        self.data_state: dict[str, Any] | None = None
        """The data source's position after the last replayed rollout, for the checkpoint; None until a file tells one."""

    def rollout(self, rollout_id: int) -> RolloutFnTrainOutput:
        """The rollout of that number. Raises ValueError naming the file when it is missing or no dump of this rollout."""
        path = dump_path(self._template, rollout_id)
        content = _read(path)
        if content["rollout_id"] != rollout_id:
            raise ValueError(
                f"--load-debug-rollout-data: {path} holds rollout {content['rollout_id']}, wanted is {rollout_id}; "
                "was it renamed?"
            )
        samples = [_sample(path, position, value) for position, value in enumerate(content["samples"])]
        if content.get("layout") is not None:
            groups = _replace_leaves(content["layout"], samples.__getitem__)
        else:
            groups = _by_group_index(path, samples)
        if self._share is not None:
            count = max(1, round(self._share * len(groups)))
            first = (count + 1) // 2
            groups = groups[:first] + groups[len(groups) - (count - first) :]
        if content.get("data_state") is not None:
            self.data_state = content["data_state"]
        return RolloutFnTrainOutput(samples=groups, metrics=content.get("metrics"))


def _replace_leaves(tree: list, leaf) -> list:
    return [_replace_leaves(item, leaf) if isinstance(item, list) else leaf(item) for item in tree]


def _by_group_index(path: Path, samples: list[Sample]) -> list[list[Sample]]:
    groups: dict[int, list[Sample]] = {}
    for position, sample in enumerate(samples):
        if sample.group_index is None:
            raise ValueError(
                f"--load-debug-rollout-data: {path}: sample {position} has no group_index, and the file no layout of groups"
            )
        groups.setdefault(sample.group_index, []).append(sample)
    return list(groups.values())


def _write(path: Path, content: dict[str, Any]) -> Path:
    import torch

    unfinished = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, unfinished)
        os.replace(unfinished, path)
    except Exception as error:  # a full disk is a RuntimeError of torch's; metadata that does not pickle, anything
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise OSError(f"the rollout dump {path} cannot be written ({type(error).__name__}: {error})") from error
    return path


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        there = sorted(file.name for file in path.parent.glob("*") if file.is_file()) if path.parent.is_dir() else []
        found = f"{path.parent} holds {len(there)} files: {', '.join(there[:8])}" if there else f"{path.parent} holds no file"
        raise ValueError(f"--load-debug-rollout-data: there is no {path}; {found}")
    try:
        content = load_values(path)
    except ValueError as error:
        raise ValueError(f"--load-debug-rollout-data: {error}") from None
    if not isinstance(content, Mapping) or "rollout_id" not in content or not isinstance(content.get("samples"), list):
        found = sorted(map(str, content))[:8] if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise ValueError(f"--load-debug-rollout-data: {path} is no rollout dump; wanted rollout_id and samples, found {found}")
    return dict(content)


def _sample(path: Path, position: int, value: Any) -> Sample:
    try:
        sample = Sample.from_dict(value)
        sample.validate()
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"--load-debug-rollout-data: {path}, sample {position}: {error}") from error
    return sample
