"""BM25 over passages in memory: a search tool without a server."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


class BM25:
    """Okapi BM25 (Robertson and Zaragoza 2009): how well passages fit a query, by their words.

    A word's weight is log(1 + (N - n + 0.5) / (n + 0.5)) for N passages of which n have it; k1 bounds what repetition adds, b
    how much long passages lose.
    """

    def __init__(self, passages: Sequence[str], *, k1: float = 1.2, b: float = 0.75):
        if not passages:
            raise ValueError("an index needs at least one passage")
        self.passages = list(passages)
        counts = [Counter(words(passage)) for passage in self.passages]
        lengths = [sum(count.values()) for count in counts]
        mean_length = sum(lengths) / len(lengths) or 1.0
        containing = Counter(word for count in counts for word in count)
        self._scores: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for number, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            norm = k1 * (1 - b + b * length / mean_length)
            for word, times in count.items():
                rarity = math.log(1 + (len(counts) - containing[word] + 0.5) / (containing[word] + 0.5))
                self._scores[word].append((number, rarity * times * (k1 + 1) / (times + norm)))

    @classmethod
    def of_file(cls, path: str | Path, key: str = "text") -> BM25:
        """The texts of a .jsonl file."""
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        return cls([json.loads(line)[key] for line in lines if line.strip()])

    def search(self, query: str, count: int = 3) -> list[tuple[str, float]]:
        """(passage, score) of the best, best first; passages without any of the words are not there."""
        total: Counter[int] = Counter()
        for word in words(query):
            for number, score in self._scores.get(word, ()):
                total[number] += score
        best = sorted(total.items(), key=lambda item: (-item[1], item[0]))[:count]
        return [(self.passages[number], score) for number, score in best]
