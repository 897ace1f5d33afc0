"""DAPO's grader (arXiv 2503.14476): the last "Answer: ..." near the end, against a number; +1 or -1."""

from __future__ import annotations

import re
from typing import Any

from slime.rollout.grading.literals import read_literal
from slime.rollout.grading.mathematics import answer_of, same_answer
from slime.rollout.grading.response import last_boxed, without_end_tokens
from slime.rollout.grading.spelling import normalise, split_unit

_ANSWER = re.compile(r"(?i)answer[*_]{0,3}\s{0,8}[:：][*_]{0,3}\s{0,8}([^\n]+)")
# The answer is asked for in the last line; looking further back would reward a guess that was revised.
LOOK_BACK = 300


def _bare(answer: str) -> str:
    answer = answer.strip().strip("*_` ")
    return last_boxed(answer) or answer


def _plain(answer: str) -> str:
    text = split_unit(normalise(answer))[0]
    text = text.rpartition("=")[2].strip()
    literal = read_literal(text)
    if literal is not None and literal.value.denominator == 1 and not literal.percent:
        return str(literal.value.numerator)
    return re.sub(r"\s+", "", text)


def grade_dapo(response: str, label: str) -> dict[str, Any]:
    """{"score": 1.0 or -1.0, "acc": bool, "pred": text}; use it with --reward-key score."""
    found = _ANSWER.findall(without_end_tokens(response)[-LOOK_BACK:])
    if not found:
        return {"score": -1.0, "acc": False, "pred": "[INVALID]"}
    given, wanted = _bare(found[-1]), _bare(answer_of(label))
    pred = _plain(given)
    correct = bool(pred) and (pred == _plain(wanted) or same_answer(given, wanted))
    return {"score": 1.0 if correct else -1.0, "acc": correct, "pred": pred}
