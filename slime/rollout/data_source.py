"""Which prompts come next. The whole position, the buffer's content included, is in `state_dict()`: a resumed run goes on
exactly.

`--data-source-path` names a class like these two: `cls(args)`, `get_samples(n)`, `add_samples(groups)`, `save(rollout_id)`,
`load(rollout_id)`, `state_dict()`, `load_state_dict(state)`, `len()`.
"""

from __future__ import annotations

import abc
import copy
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slime.compat.pickles import load_values
from slime.rollout.base_types import Group, flatten
from slime.rollout.dataset import PromptFormat, read_prompts
from slime.types.sample import Sample

logger = logging.getLogger(__name__)

_STATE = ("state_dict", "load_state_dict")
_FILES = ("save", "load")
_COUNTERS = ("sample_offset", "epoch_id", "sample_group_index", "sample_index")


def state_path(folder: str, rollout_id: int) -> Path:
    return Path(folder) / "rollout" / f"global_dataset_state_dict_{rollout_id}.pt"


class DataSource(abc.ABC):
    """What a class of --data-source-path does at least; slime's plugins derive from it.

    Such a class keeps its position in files of its own: `save(rollout_id)` is called with every checkpoint of the run, `load`
    with the rollout that a resumed run continues after. One that also has `state_dict` and `load_state_dict` keeps it inside
    the checkpoint.
    """

    @abc.abstractmethod
    def get_samples(self, num_samples: int) -> list[Group]:
        """The next `num_samples` groups."""

    @abc.abstractmethod
    def add_samples(self, samples: list[Group]) -> None:
        """Take groups back."""

    @abc.abstractmethod
    def save(self, rollout_id: int) -> None:
        """Write the position after `rollout_id`."""

    @abc.abstractmethod
    def load(self, rollout_id: int | None = None) -> None:
        """Go to the position after `rollout_id`."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Prompts of one epoch."""


def _has(source: Any, names: tuple[str, ...]) -> bool:
    return all(callable(getattr(source, name, None)) for name in names)


def has_a_state(source: Any) -> bool:
    """Whether a data source (or its class) can say its position."""
    return _has(source, _STATE)


def keeps_itself(source: Any) -> bool:
    """Whether it can write its position to files of its own."""
    return _has(source, _FILES)


def state_of(source: Any, *, saving: int | None = None) -> dict[str, Any]:
    """The position of a data source. saving: the rollout whose checkpoint is being written; None where there is none."""
    if has_a_state(source):
        return source.state_dict()
    if saving is not None:
        source.save(saving)
    return {"saved_by_the_source": saving}


def return_to(
    source: Any,
    state: dict[str, Any],
    *,
    put_back: Callable[[list[Group]], None] | None = None,
    same_run: bool = False,
) -> None:
    """Bring a data source to the position that `state_of` told.

    put_back: takes groups that a fully asynchronous run had begun and not trained, where the source has no buffer for them;
    None: `source.add_samples` does. same_run: versions of weights have not been counted anew since.
    """
    state = dict(state)
    begun = state.pop("begun", None)
    groups = [] if begun is None else begun["groups"]
    if begun is not None and not same_run:
        groups, state = _renumbered(groups, begun["version"]), state | _renumbered_buffer(state, begun["version"])
    if "buffer" in state:
        groups, state["buffer"] = [], [*groups, *state["buffer"]]
    if has_a_state(source):
        source.load_state_dict(state)
    elif state.get("saved_by_the_source") is not None:
        source.load(state["saved_by_the_source"])
    else:
        logger.warning("%s has no state_dict: it goes on with its next prompts", type(source).__name__)
    if groups:
        (put_back or source.add_samples)([[_unpack(item) for item in group] for group in groups])


def with_begun(state: dict[str, Any], groups: list[Group], *, run: str, version: int) -> dict[str, Any]:
    """A position, and the groups that were taken before it and are not trained. version: of the newest weights of this run."""
    packed = [[_pack(item) for item in group] for group in groups]
    return state | {"begun": {"groups": packed, "run": run, "version": version}}


def made_by(state: dict[str, Any], run: str) -> bool:
    return state.get("begun", {}).get("run") == run


def _renumbered(packed: list, newest: int) -> list:
    """Packed groups whose weight versions count down from 0, the newest of the run that wrote them; the next counts from 1."""

    def item(one: dict | list) -> dict | list:
        if isinstance(one, list):
            return [item(part) for part in one]
        spans = [[_minus(version, newest), count] for version, count in one.get("weight_version_spans", [])]
        versions = [_minus(version, newest) for version in one.get("weight_versions", [])]
        return one | {"weight_versions": versions, "weight_version_spans": spans}

    return [item(group) for group in packed]


def _renumbered_buffer(state: dict[str, Any], newest: int) -> dict[str, Any]:
    return {"buffer": _renumbered(state["buffer"], newest)} if "buffer" in state else {}


def _minus(version: str, newest: int) -> str:
    return str(int(version) - newest) if version.lstrip("-").isdigit() else version


class RolloutDataSource(DataSource):
    """Prompts of a file, epoch after epoch, shuffled anew in each if `--rollout-shuffle`."""

    def __init__(self, args: Any):
        self.args = args
        self.epoch_id = 0
        self.sample_offset = 0
        """Prompts taken from the current epoch."""
        self.sample_group_index = 0
        self.sample_index = 0
        self.metadata: dict[str, Any] = {}
        """A plugin's own; saved and restored."""
        self.prompts = self._read() if args.rollout_global_dataset else []
        self._order = self._epoch_order()

    def _read(self) -> list[Sample]:
        args = self.args
        if not args.prompt_data and args.num_rollout == 0:
            return []
        if not args.prompt_data:
            raise ValueError(
                "no prompts: pass --prompt-data FILE, or --disable-rollout-global-dataset if the rollout finds its own"
            )
        tokenizer = None
        if args.apply_chat_template or args.rollout_max_prompt_len is not None:
            from slime.rollout.tokenizer import load_tokenizer

            tokenizer = load_tokenizer(args.hf_checkpoint)
        form = PromptFormat(
            input_key=args.input_key,
            label_key=args.label_key,
            metadata_key=args.metadata_key,
            tool_key=args.tool_key,
            apply_chat_template=args.apply_chat_template,
            apply_chat_template_kwargs=args.apply_chat_template_kwargs,
        )
        return read_prompts(
            args.prompt_data,
            form,
            tokenizer=tokenizer,
            max_prompt_len=args.rollout_max_prompt_len,
            on_broken=args.on_broken_prompt_line,
        )

    def __len__(self) -> int:
        """Prompts of one epoch."""
        return len(self.prompts)

    def _epoch_order(self) -> list[int]:
        order = list(range(len(self.prompts)))
        if self.args.rollout_shuffle:
            random.Random(self.args.rollout_seed + self.epoch_id).shuffle(order)
        return order

    def get_samples(self, num_samples: int) -> list[Group]:
        """The next `num_samples` prompts, each as a group of n_samples_per_prompt fresh samples; as many epochs as that
        takes."""
        return [self._group(prompt) for prompt in self._take(num_samples)]

    def _take(self, count: int) -> list[Sample]:
        if not self.prompts:
            return [Sample() for _ in range(count)]
        taken: list[Sample] = []
        while len(taken) < count:
            if self.sample_offset >= len(self.prompts):
                self.epoch_id += 1
                self.sample_offset = 0
                self._order = self._epoch_order()
            end = min(self.sample_offset + count - len(taken), len(self.prompts))
            taken += [self.prompts[i] for i in self._order[self.sample_offset : end]]
            self.sample_offset = end
        return taken

    def _group(self, prompt: Sample) -> Group:
        group = []
        for _ in range(self.args.n_samples_per_prompt):
            sample = copy.deepcopy(prompt)
            sample.group_index, sample.index = self.sample_group_index, self.sample_index
            self.sample_index += 1
            group.append(sample)
        self.sample_group_index += 1
        return group

    def add_samples(self, samples: list[Group]) -> None:
        raise ValueError(f"{type(self).__name__} keeps no buffer; use slime.rollout.data_source.RolloutDataSourceWithBuffer")

    # ------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides which samples come next; plain values, independent of later changes."""
        counters = {name: getattr(self, name) for name in _COUNTERS}
        return {**counters, "num_prompts": len(self.prompts), "metadata": copy.deepcopy(self.metadata)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        known = state.get("num_prompts", len(self.prompts))
        if known != len(self.prompts):
            logger.warning(
                "the prompts have changed since the checkpoint (%d then, %d now): epoch %d goes on at prompt %d",
                known, len(self.prompts), state["epoch_id"], state["sample_offset"],
            )  # fmt: skip
        for name in _COUNTERS:
            setattr(self, name, state[name])
        self.metadata = copy.deepcopy(state.get("metadata") or {})
        self._order = self._epoch_order()

    def save(self, rollout_id: int) -> None:
        """Write the state beside the checkpoint of `--save`, all of it or nothing."""
        import torch

        path = state_path(self.args.save, rollout_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        torch.save(self.state_dict(), unfinished)
        os.replace(unfinished, path)

    def load(self, rollout_id: int | None = None) -> None:
        """Read the state after `rollout_id` from `--load`; a first run has none and starts at the beginning."""
        if not self.args.load:
            return
        if rollout_id is None:
            rollout_id = (self.args.start_rollout_id or 0) - 1
        path = state_path(self.args.load, rollout_id)
        if not path.exists():
            logger.info("no data position at %s: prompts start at the beginning", path)
            return
        self.load_state_dict(load_values(path))


class RolloutDataSourceWithBuffer(RolloutDataSource):
    """The same with a buffer in front: groups put back (unfinished, or finished but not needed) come out first."""

    def __init__(self, args: Any):
        super().__init__(args)
        self.buffer: list[Group] = []
        self._filter: Callable[..., list[Group]] = pop_first
        if args.buffer_filter_path:
            from slime.rollout.plugins import load_function

            self._filter = load_function("--buffer-filter-path", args.buffer_filter_path)

    def get_samples(self, num_samples: int) -> list[Group]:
        groups = self._filter(self.args, None, self.buffer, num_samples) if self.buffer else []
        if len(groups) > num_samples:
            raise ValueError(f"the buffer filter gave {len(groups)} groups, {num_samples} were asked for")
        return groups + super().get_samples(num_samples - len(groups))

    def add_samples(self, samples: list[Group]) -> None:
        """Put groups back. Raises ValueError unless each is a whole group."""
        wanted = self.args.n_samples_per_prompt
        for group in samples:
            if len(group) != wanted:
                raise ValueError(f"a group for the buffer has {len(group)} samples, --n-samples-per-prompt is {wanted}")
        self.buffer.extend(samples)

    def get_buffer_length(self) -> int:
        return len(self.buffer)

    def state_dict(self) -> dict[str, Any]:
        buffer = [[_pack(item) for item in group] for group in self.buffer]
        return super().state_dict() | {"buffer": copy.deepcopy(buffer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        groups = [[_unpack(item) for item in group] for group in copy.deepcopy(state.get("buffer") or [])]
        self._resize(groups)
        self.buffer = groups

    def _resize(self, groups: list[Group]) -> None:
        """Groups that were saved with another --n-samples-per-prompt get fresh samples of their prompt, or lose the least
        advanced ones: a rollout's number of samples follows from the flag."""
        wanted = self.args.n_samples_per_prompt
        others = [group for group in groups if len(group) != wanted]
        if not others:
            return
        sizes = sorted({len(group) for group in others})
        added = removed = 0
        for group in others:
            first = flatten(group)[0]
            while len(group) < wanted:
                group.append(self._fresh(first))
                added += 1
            removed += len(group) - wanted
            group.sort(key=_tokens_generated, reverse=True)
            del group[wanted:]
        logger.warning(
            "the buffer's %d groups of %s samples become groups of --n-samples-per-prompt %d: "
            "%d fresh samples added, %d removed",
            len(others), "/".join(map(str, sizes)), wanted, added, removed,
        )  # fmt: skip

    def _fresh(self, sibling: Sample) -> Sample:
        """Another sample of the same prompt, of which nothing has been generated."""
        sample = copy.deepcopy(sibling)
        sample.reset_for_retry()
        sample.tokens, sample.rollout_id, sample.session_id = [], None, None
        sample.index = self.sample_index
        self.sample_index += 1
        return sample


def _tokens_generated(item: Sample | list) -> int:
    return sum(sample.response_length for sample in flatten([item]))


def _pack(item: Sample | list) -> dict | list:
    return [_pack(part) for part in item] if isinstance(item, list) else item.to_dict()


def _unpack(item: dict | list) -> Sample | list:
    return [_unpack(part) for part in item] if isinstance(item, list) else Sample.from_dict(item)


def pop_first(args: Any, rollout_id: int | None, buffer: list[Group], num_samples: int) -> list[Group]:
    """The default --buffer-filter-path: the oldest groups, removed from the buffer."""
    taken = buffer[:num_samples]
    del buffer[:num_samples]
    return taken
