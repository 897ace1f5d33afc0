"""A built-in grader as a plain function call, for graders of the user's that build on one. It blocks, with a time-out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slime.rollout.grading.pool import shared_pool
from slime.rollout.grading.question import Question, Verdict


def graded(grader: str, response: str, label: Any, metadata: Mapping[str, Any] | None = None) -> Verdict:
    """What `--rm-type grader` gives. Raises ValueError when it cannot grade, GradingError when it broke or took too long."""
    from slime.rollout.rm_hub import TEXT_SECONDS, num_workers  # its package offers what is made of this file

    return shared_pool(num_workers(None)).grade_now(Question(grader, response, label, dict(metadata or {})), TEXT_SECONDS)
