"""Words, sentences and numbers of a row, as all checks cut them."""

from __future__ import annotations

import re
import string
from collections.abc import Callable

Check = Callable[..., bool]

EDGES = string.punctuation + " "
_TOKEN = re.compile(r"\w+(?:[-'’.]\w+)*|[^\w\s]")
_NO_END = re.compile(
    r"\b(?:Mr|Mrs|Ms|Dr|St|Prof|Capt|Lt|Jr|Sr|Inc|Ltd|Co|vs|etc|e\.g|i\.e|No|Vol|Fig|approx|[A-Z])\.$|\b(?:[A-Za-z]\.){2,}$"
)
# It begins with the first mark of a run: from each mark on, a long run of them would take square time.
_END = re.compile(r"(?<![.!?])[.!?]+[\"'”’)\]]*(?=\s|$)")


def sentences(text: str) -> list[str]:
    """Parts that end with . ! or ?, before white space; titles, initials and abbreviations end none. The rest is one more."""
    text = " ".join(text.split())
    found, start = [], 0
    for end in _END.finditer(text):
        if end[0][0] == "." and end[0] != "..." and _NO_END.search(text[max(start, end.start() - 20) : end.start() + 1]):
            continue
        found.append(text[start : end.end()].strip())
        start = end.end()
    return [*found, text[start:].strip()] if text[start:].strip() else found


def num_words(text: str) -> int:
    """Runs of letters, digits and underscores: don't is two."""
    return len(re.findall(r"\w+", text))


def tokens(text: str) -> list[str]:
    """Words and, each by itself, marks of punctuation."""
    return _TOKEN.findall(text)


def bare_words(text: str) -> list[str]:
    """What white space separates once all ASCII punctuation is gone."""
    return text.translate(str.maketrans("", "", string.punctuation)).split()


def holds(count: float, relation: str, threshold: float) -> bool:
    """`less than` or `at least`, the two relations of IFEval."""
    if relation not in ("less than", "at least"):
        raise ValueError(f"relation {relation!r} is neither 'less than' nor 'at least'")
    return count < threshold if relation == "less than" else count >= threshold
