"""BM25 against its formula, written down anew."""

from __future__ import annotations

import json
import math

import pytest

from slime.rollout.agents.retrieval import BM25

PASSAGES = [
    "Rome is the capital of Italy.",
    "Paris is the capital of France; Paris is large.",
    "The Tiber flows through Rome, and Rome was not built in a day.",
    "Nothing of that.",
]


def by_hand(passage: str, query: str, k1: float = 1.2, b: float = 0.75) -> float:
    """Robertson and Zaragoza 2009, equation 3.15, for texts of words and full stops."""
    split = lambda text: text.lower().replace(".", "").replace(",", "").replace(";", "").split()  # noqa: E731
    texts = [split(p) for p in PASSAGES]
    mean = sum(map(len, texts)) / len(texts)
    score, words = 0.0, split(passage)
    for word in split(query):
        n, times = sum(word in text for text in texts), words.count(word)
        idf = math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
        score += idf * times * (k1 + 1) / (times + k1 * (1 - b + b * len(words) / mean))
    return score


@pytest.mark.parametrize("query", ["capital of Italy", "ROME", "is Paris large?", "the day of that"])
def test_scores_are_the_formulas(query):
    found = BM25(PASSAGES).search(query, count=9)
    expected = {passage: by_hand(passage, query.replace("?", "")) for passage in PASSAGES}
    assert {passage: pytest.approx(score, rel=1e-12) for passage, score in found} == {
        passage: score for passage, score in expected.items() if score > 0
    }
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)


def test_what_has_none_of_the_words_is_not_found(tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"text": passage}) + "\n\n" for passage in PASSAGES))
    index = BM25.of_file(tmp_path / "p.jsonl")
    assert index.search("Berlin") == [] and [text for text, _ in index.search("rome", count=1)] == [PASSAGES[2]]
    with pytest.raises(ValueError, match="at least one passage"):
        BM25([])
