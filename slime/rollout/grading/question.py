"""What a worker is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Verdict = float | dict[str, Any]


@dataclass(frozen=True)
class Question:
    grader: str
    """Its name, without the prefix boxed_."""
    response: str
    label: Any
    metadata: Mapping[str, Any]
    """The keys that this grader reads."""
    boxed: bool = False
    """Grade the content of the last box instead of the response."""
