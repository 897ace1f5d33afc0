"""The training commands among the calls of a launcher: their flags, their variables, and which loop they want."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tools.foreign.watch import Call, Watched

LOOPS = {"train.py": "slime.train", "train_async.py": "slime.train_async"}
"""File at the public project's root -> the module that does its work here."""
SCHEDULE = {"slime.train": (), "slime.train_async": ("--schedule", "one-step-ahead")}
"""Module -> the words with which slime.train does the same."""
KEPT_BY_NAME = re.compile(
    r"^(NCCL|GLOO|TP|NVTE|NVSHMEM|SGLANG|SGL|TORCH|PYTORCH|CUDA|MC|UCX|SLIME|WANDB|TENSORBOARD|DEEP|INDEXER|NO|no)_|^PYTHONPATH$"
)
"""Variables of the shell that a command started without Ray would have inherited, perhaps on purpose."""


@dataclass(frozen=True)
class Job:
    """One training command."""

    words: tuple[str, ...]
    """Its flags."""
    module: str
    environment: Mapping[str, str]
    arrays: Mapping[str, tuple[str, ...]]
    slots: str
    """GPUs that its launcher told Ray of; "" where it did not."""
    torn: str = ""
    """The word at which its launcher forgot to go on in the same line; "" where it did not."""

    @property
    def schedule(self) -> tuple[str, ...]:
        """Words that are not its own: our launchers start slime.train, whose loop a flag chooses."""
        return SCHEDULE[self.module] if "--schedule" not in self.words else ()


def jobs_of(watched: Watched) -> list[Job]:
    """In the order in which they would have run."""
    slots = ""
    jobs: list[Job] = []
    for call in watched.calls:
        if tuple(call.words[:2]) == ("ray", "start"):
            slots = _value(call.words, "--num-gpus") or slots
        elif (found := _training(call.words)) is not None:
            module, flags = found
            jobs.append(Job(flags, module, _environment(call), call.arrays, slots))
        elif jobs and call.words[0].startswith("--"):
            # No program is called so: the line before lacks its backslash, as in two launchers of the public project.
            jobs[-1] = replace(jobs[-1], words=(*jobs[-1].words, *call.words), torn=call.words[0])
    return jobs


def more_environment(job: Job) -> dict[str, str]:
    """What its environment lacks: engines with DeepEP are told of NVSHMEM here, where the public image brings its own."""
    deepep = "--sglang-enable-deepep-moe" in job.words or last_value(job.words, "--sglang-moe-a2a-backend") == "deepep"
    return {"NVSHMEM_DISABLE_NCCL": "1"} if deepep and "NVSHMEM_DISABLE_NCCL" not in job.environment else {}


def _training(words: Sequence[str]) -> tuple[str, tuple[str, ...]] | None:
    """(module, flags) of a command that trains, however it is wrapped: ray job submit, nohup, torchrun, bash -c."""
    for position, word in enumerate(words):
        if Path(word).name in LOOPS:
            return LOOPS[Path(word).name], tuple(words[position + 1 :])
        if word == "-m" and position + 1 < len(words) and words[position + 1] in LOOPS.values():
            return words[position + 1], tuple(words[position + 2 :])
        if any(re.search(rf"{re.escape(file)}\s", word) for file in LOOPS):
            try:
                inner = list(shlex.split(word))
            except ValueError:
                return None
            cut = next((at for at, one in enumerate(inner) if one in ("&&", ";", "|") and _training(inner[:at])), len(inner))
            return _training(inner[:cut])
    return None


def _environment(call: Call) -> dict[str, str]:
    """What the job gets: Ray's runtime environment, or the shell's variables where the command was started without Ray."""
    text = _value(call.words, "--runtime-env-json")
    if not (text or "").strip():  # also what a program printed that was not run
        return {name: value for name, value in call.environment.items() if KEPT_BY_NAME.match(name)}
    try:
        variables = json.loads(text).get("env_vars", {})
    except (ValueError, AttributeError) as error:
        raise ValueError(f"--runtime-env-json of the launcher is no JSON object ({error}): {text[:120]!r}") from None
    return {str(name): str(value) for name, value in variables.items()}


def _value(words: Sequence[str], name: str) -> str | None:
    for position, word in enumerate(words):
        if word == name and position + 1 < len(words):
            return words[position + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def split_flags(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(flag, its words) in order; words before the first flag come under ""."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word.partition("=")
            found.append((name, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
        else:
            found.append(("", [word]))
    return found


def last_value(words: Sequence[str], name: str) -> str | None:
    """As the command line means it: the last one wins."""
    values = [given for flag, given in split_flags(words) if flag == name and given]
    return values[-1][0] if values else None
