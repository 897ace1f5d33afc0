"""Token F1 of question answering (SQuAD): the overlap of words, without articles, punctuation and case."""

from __future__ import annotations

import re
import string
from collections import Counter

_YES_NO = ("yes", "no", "noanswer")


def words(text: str) -> list[str]:
    text = "".join(" " if char in string.punctuation else char for char in text.lower())
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def token_f1(prediction: str, truth: str) -> float:
    """Harmonic mean of precision and recall over word counts. A yes/no answer must match as a whole."""
    given, wanted = words(prediction), words(truth)
    if given != wanted and (" ".join(given) in _YES_NO or " ".join(wanted) in _YES_NO):
        return 0.0
    common = (Counter(given) & Counter(wanted)).total()
    if common == 0:
        return float(given == wanted)
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)
