"""What the disk says about a run: the only reading that derivations depend on, done once, so that `resolve()` stays pure."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from slime.config.errors import ConfigError
from slime.config.hf_fields import FAMILIES
from slime.config.prompt_files import file_problem

MOST_LINES = 100_000
"""More rows of a file are not counted: no batch has as many prompts."""
TRACKER = "latest_checkpointed_iteration.txt"
LoadKind = Literal["nothing", "megatron", "release", "iteration", "hf", "unknown"]
"""What a folder holds: nothing at all, a Megatron checkpoint with an iteration or with the word "release" in its tracker, one
iteration's folder itself, an HF model, or an HF model that no weight-name table knows."""


def _nothing_known(path: str) -> str:
    return ""


def _no_file(path: str | None) -> bool:
    return False


@dataclass(frozen=True)
class Facts:
    """Answers from the disk and the environment."""

    load: LoadKind = "nothing"
    ref_load: LoadKind = "nothing"
    opd_teacher_load: LoadKind = "nothing"
    hf_config: Mapping[str, object] | None = None
    """config.json of --hf-checkpoint, when that is a folder on this machine."""
    hf_source: str = ""
    """What stands for it where it is not; messages name it."""
    tensorboard_dir: str | None = None
    prompt_file_problem: Callable[[str], str] = _nothing_known
    """A prompt file as a flag or YAML names it -> why nothing can be read from it, empty when it can. A question, not an
    answer: which files there are is known only once the YAML of the evaluation has been read."""
    is_file: Callable[[str | None], bool] = _no_file
    """Is the path a file of this machine?"""
    load_step: int | None = None
    """Rollout after which the newest checkpoint in --load was saved, from 0; None where it holds none."""
    load_problem: str = ""
    """Why the checkpoint of --load that its tracker or --ckpt-step names cannot be read, or empty."""
    ref_load_problem: str = ""
    opd_teacher_problem: str = ""
    num_prompts: int | None = None
    """Rows of --prompt-data, at most MOST_LINES; None where nobody can say so quickly."""


def kind_of(folder: str | None) -> LoadKind:
    """What a checkpoint folder holds."""
    if folder is None or not os.path.isdir(folder):
        return "nothing"
    root = Path(folder)
    tracker = root / TRACKER
    if tracker.is_file():
        return "release" if tracker.read_text(errors="replace").strip() == "release" else "megatron"
    if (root / ".metadata").exists() or (root / "common.pt").exists() or (root / "metadata.json").exists():
        return "iteration"
    family = (_config_json(folder, of="a checkpoint's folder") or {}).get("model_type")
    if family:
        return "hf" if family in FAMILIES else "unknown"
    return "nothing"  # also logs, or a first save that was torn: without a tracker there is nothing to continue from


def named_problem(folder: str | None, step: int | None, *, step_flag: str) -> str:
    """Why `folder` lacks the checkpoint that `step`, or else its tracker, names, with the way out; empty where it has it."""
    if folder is None or not os.path.isdir(folder):
        return ""
    root = Path(folder)
    tracker = root / TRACKER
    if re.fullmatch(r"iter_\d+", root.name):  # one checkpoint itself, whatever step is asked for
        return ""
    if step is None and not tracker.is_file():
        return ""
    value = str(step) if step is not None else tracker.read_text(errors="replace").strip()
    if value != "release" and not re.fullmatch(r"\d{1,9}", value):
        return f"{tracker} says {value[:40]!r}, which is neither a number nor 'release'; {_others(root, step_flag)}"
    name = value if value == "release" else f"iter_{int(value):07d}"
    if (root / name).is_dir():
        return ""
    said = f"{step_flag} {step}" if step is not None else str(tracker)
    aside = root / f".replaced_{name}"  # a save that was killed while it put a new state in the place of this one
    if aside.is_dir():
        return f"{said} names {root / name}, which does not exist; its former state does: mv {aside} {root / name}"
    return f"{said} names {root / name}, which does not exist; {_others(root, step_flag)}"


def _others(root: Path, step_flag: str) -> str:
    there = sorted(int(found[1]) for one in root.glob("iter_*") if (found := re.fullmatch(r"iter_(\d+)", one.name)))
    if not there:
        return f"no other checkpoint is there: name another folder, or leave {step_flag} out"
    return (
        f"{', '.join(map(str, there[-8:]))} are there: take one that tools/inspect_checkpoint.py --verify finds whole, with "
        f"{step_flag}"
    )


def read_hf_config(folder: str | None) -> Mapping[str, object] | None:
    """config.json of an HF folder, or None when there is no such file. Raises ConfigError when it cannot be read, or is none of
    a model."""
    raw = None if folder is None else _config_json(folder, of="--hf-checkpoint")
    inner = {} if raw is None else raw.get("text_config")
    if raw is not None and not raw.get("model_type") and not (isinstance(inner, dict) and inner.get("model_type")):
        raise ConfigError(
            f"--hf-checkpoint: {str(Path(folder) / 'config.json')!r} has no model_type, by which a model's family is known; "
            "download it again"
        )
    return raw


def _config_json(folder: str, *, of: str) -> Mapping[str, object] | None:
    file = Path(folder) / "config.json"
    try:
        raw = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{of}: cannot read {str(file)!r}: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{of}: {str(file)!r} is no JSON object but a {type(raw).__name__}; download it again")
    return raw


def step_of(folder: str | None) -> int | None:
    """What the tracker of a checkpoint folder names; None where there is none, or another word."""
    try:
        return int((Path(folder) / TRACKER).read_text()) if folder is not None else None
    except (OSError, ValueError):
        return None


def count_prompts(data: str | None) -> int | None:
    """Rows of a `file.jsonl` or `file.jsonl@[first:end]`."""
    file, _, part = (data or "").partition("@[")
    bounds = re.fullmatch(r"(-?\d*):(-?\d*)\]", part) if part else None
    if not file.endswith(".jsonl") or (part and not bounds):
        return None
    try:
        with open(file, "rb") as lines:
            count = sum(1 for line in islice(lines, MOST_LINES) if line.strip())
    except OSError:
        return None
    if bounds is None or count == MOST_LINES:
        return count
    return len(range(count)[slice(*(int(bound) if bound else None for bound in bounds.groups()))])


def gather_facts(
    *,
    load: str | None,
    ref_load: str | None,
    hf_checkpoint: str | None,
    prompt_data: str | None = None,
    opd_teacher_load: str | None = None,
    ckpt_step: int | None = None,
    ref_ckpt_step: int | None = None,
    opd_teacher_ckpt_step: int | None = None,
) -> Facts:
    return Facts(
        load=kind_of(load),
        ref_load=kind_of(ref_load),
        opd_teacher_load=kind_of(opd_teacher_load),
        hf_config=read_hf_config(hf_checkpoint),
        tensorboard_dir=os.environ.get("TENSORBOARD_DIR"),
        prompt_file_problem=file_problem,
        is_file=lambda path: bool(path) and os.path.isfile(path),
        load_step=step_of(load),
        load_problem=named_problem(load, ckpt_step, step_flag="--ckpt-step"),
        ref_load_problem=named_problem(ref_load, ref_ckpt_step, step_flag="--ref-ckpt-step"),
        opd_teacher_problem=named_problem(opd_teacher_load, opd_teacher_ckpt_step, step_flag="--opd-teacher-ckpt-step"),
        num_prompts=count_prompts(prompt_data),
    )


def facts_of(start: Mapping[str, Any]) -> Facts:
    """The facts about the files that attributes name."""
    names = """load ref_load hf_checkpoint prompt_data opd_teacher_load ckpt_step ref_ckpt_step opd_teacher_ckpt_step"""
    return gather_facts(**{name: start[name] for name in names.split()})
