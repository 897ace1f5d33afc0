"""DAPO's grader (arXiv 2503.14476): the last "Answer: ..." near the end, against a whole number; +1 or -1."""

from __future__ import annotations

import re
from typing import Any

from slime.rollout.grading.math_grader import last_boxed, normalise

_ANSWER = re.compile(r"(?i)answer\s*:\s*([^\n]+)")
# The answer is asked for in the last line; looking further back would reward a guess that was revised.
LOOK_BACK = 300


def _plain(answer: str) -> str:
    text = normalise(answer.strip().strip("*").split("=")[-1])
    return re.sub(r"\.0+$", "", text)


def grade_dapo(response: str, label: str) -> dict[str, Any]:
    """{"score": 1.0 or -1.0, "acc": bool, "pred": text}; use it with --reward-key score."""
    wanted = last_boxed(label) or label
    try:
        wanted = str(int(float(wanted.replace(",", ""))))
    except (ValueError, OverflowError):
        wanted = _plain(wanted)
    found = _ANSWER.findall(response[-LOOK_BACK:])
    if not found:
        return {"score": -1.0, "acc": False, "pred": "[INVALID]"}
    given = found[-1]
    pred = _plain(last_boxed(given) or given)
    correct = pred == wanted
    return {"score": 1.0 if correct else -1.0, "acc": correct, "pred": pred}
