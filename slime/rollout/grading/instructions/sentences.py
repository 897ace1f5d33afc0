"""IFBench: instructions about sentences."""

from __future__ import annotations

from slime.rollout.grading.instructions.text import EDGES, Check, bare_words, sentences


def _ending(response: str, mark: str) -> int:
    return sum(sentence.endswith(mark) for sentence in sentences(response))


def sentence_type(response: str) -> bool:
    """Two statements to a question."""
    return _ending(response, ".") == 2 * _ending(response, "?")


def sentence_balance(response: str) -> bool:
    return _ending(response, ".") == _ending(response, "?") == _ending(response, "!")


def sentence_words(response: str) -> bool:
    """Three sentences of equally many characters."""
    found = sentences(response)
    return len(found) == 3 and len({len(sentence) for sentence in found}) == 1


def alliteration_increment(response: str) -> bool:
    """Each sentence has more words in runs of one first letter than the one before."""
    before = -1
    for sentence in sentences(response):
        letters = [word[0] for word in (word.lstrip(EDGES) for word in sentence.lower().split()) if word]
        same = [one == other for one, other in zip(letters, letters[1:], strict=False)]
        count = sum((1 if same[place - 1 : place] == [True] else 2) for place, equal in enumerate(same) if equal)
        if count <= before:
            return False
        before = count
    return True


def keyword(response: str, word: str, N: int) -> bool:
    """In the N-th sentence."""
    found = sentences(response)
    return 1 <= N <= len(found) and word.lower() in found[N - 1].lower()


def increment(response: str, small_n: int) -> bool:
    """Each sentence has small_n words more than the one before."""
    counts = [len(bare_words(sentence)) for sentence in sentences(response)]
    return bool(counts) and all(after == before + small_n for before, after in zip(counts, counts[1:], strict=False))


CHECKS: dict[str, Check] = {
    "ratio:sentence_type": sentence_type,
    "ratio:sentence_balance": sentence_balance,
    "ratio:sentence_words": sentence_words,
    "sentence:alliteration_increment": alliteration_increment,
    "sentence:keyword": keyword,
    "sentence:increment": increment,
}
