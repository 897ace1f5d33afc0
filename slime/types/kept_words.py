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

    @staticmethod
    def of_response(ids: np.ndarray, offsets: np.ndarray, tokens: np.ndarray, trained: np.ndarray, *, who: str) -> KeptWords:
        """tokens, trained (bool) [response tokens]. Raises ValueError naming `who` where spans are not as many as tokens, or
        leave out a trained one."""
        try:
            kept = KeptWords(np.asarray(ids, np.int32), np.asarray(offsets, np.int32))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{who}: its top-p ids and offsets are no whole numbers ({error})") from None
        n, offsets = len(tokens), kept.offsets
        if offsets.shape != (n + 1,) or offsets[0] != 0 or offsets[-1] != len(kept.ids) or (np.diff(offsets) < 0).any():
            raise ValueError(
                f"{who}: top-p offsets must be {n + 1} rising numbers from 0 to {len(kept.ids)}; got {offsets.size} from "
                f"{offsets[:1]} to {offsets[-1:]}"
            )
        if (without := kept._first_without(tokens, trained)) is not None:
            raise ValueError(
                f"{who}: response token {without} ({tokens[without]}) is trained, but not among the words that "
                "top-p or top-k left for it; the engine's answer is not this sample's"
            )
        return kept

    @staticmethod
    def of_nothing(num_tokens: int) -> KeptWords:
        """For a response of which nothing is trained."""
        return KeptWords(np.zeros(0, np.int32), np.zeros(num_tokens + 1, np.int32))

    def _first_without(self, tokens: np.ndarray, trained: np.ndarray) -> int | None:
        """The first trained token that is not among its own words; tokens and trained (bool) [response tokens]."""
        counts = np.diff(self.offsets)
        owner = np.repeat(np.arange(len(counts)), counts)
        found = np.zeros(len(counts), bool)
        found[owner[self.ids == tokens[owner]]] = True
        wrong = np.flatnonzero(trained & ~found)
        return int(wrong[0]) if len(wrong) else None
