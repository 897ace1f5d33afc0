"""What graders answer, as plain Python values: a number of NumPy's or torch's, or an array that holds one, is a number too."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from numbers import Real
from typing import Any


def plain_reward(value: Any) -> Any:
    """A scalar of another library as an int, float or bool; mappings entry by entry; anything else as it is."""
    if isinstance(value, Mapping):
        return {key: plain_reward(entry) for key, entry in value.items()}
    if callable(getattr(value, "item", None)):
        try:
            return value.item()
        except (ValueError, RuntimeError):  # an array of several: whoever needs one number names it
            return value
    if isinstance(value, Real | Decimal) and not isinstance(value, int | float):
        return float(value)
    return value


def one_reward_each(answer: Any, count: int, *, who: str) -> list[Any]:
    """The rewards of `count` samples from what a grader of lists gave: a list, a tuple or an array ([count] or [count, 1]).

    Raises ValueError naming `who` when there is not one for each.
    """
    rewards = answer
    if callable(getattr(answer, "tolist", None)):
        rewards = (answer.reshape(-1) if callable(getattr(answer, "reshape", None)) else answer).tolist()
    if not isinstance(rewards, list | tuple) or len(rewards) != count:
        found = f"{len(rewards)} rewards" if isinstance(rewards, list | tuple) else repr(answer)[:80]
        raise ValueError(f"{who} gave {found} for a list of {count} samples")
    return [plain_reward(reward) for reward in rewards]
