"""Tests that take too long for every change: run where SLIME_BY_HAND is set."""

from __future__ import annotations

import os

import pytest

IS_SET = "SLIME_BY_HAND" in os.environ


def by_hand(cost: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not IS_SET, reason=f"{cost}: by hand, with SLIME_BY_HAND=1")
