"""The words that top-p and top-k sampling left a token to be drawn from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class KeptWords:
    """Of a sample's response; a token with an empty span was not drawn, or from the whole vocabulary."""

    ids: np.ndarray
    """int32 [n]: the words of one response token after the other."""
    offsets: np.ndarray
    """int32 [response tokens + 1]: token i was drawn from ids[offsets[i] : offsets[i + 1]]."""

    def first_without(self, tokens: np.ndarray, trained: np.ndarray) -> int | None:
        """The first trained token that is not among its own words; tokens and trained (bool) [response tokens]."""
        counts = np.diff(self.offsets)
        owner = np.repeat(np.arange(len(counts)), counts)
        found = np.zeros(len(counts), bool)
        found[owner[self.ids == tokens[owner]]] = True
        wrong = np.flatnonzero(trained & ~found)
        return int(wrong[0]) if len(wrong) else None
