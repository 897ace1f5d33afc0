"""The files of a tiny task: prompts to train on, prompts that were held out, conversations of the warm start."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def hold_out(problems: Sequence[T], num_eval: int, generator: random.Random) -> tuple[list[T], list[T]]:
    """(to train on, held out), both shuffled."""
    shuffled = list(problems)
    generator.shuffle(shuffled)
    return shuffled[num_eval:], shuffled[:num_eval]


def write(folder: Path, **rows: list[dict]) -> None:
    """FOLDER/NAME.jsonl for each name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
