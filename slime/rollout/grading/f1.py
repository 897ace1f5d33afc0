"""Token F1 of question answering (SQuAD): the overlap of words, without case, punctuation and articles."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter

from slime.rollout.grading.response import answer_part, without_end_tokens

_YES_NO = ("yes", "no", "noanswer")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def words(text: str) -> list[str]:
    """SQuAD's order: lower case, punctuation removed (1,000 is 1000 and U.S. is us), articles removed, split at white space."""
    text = unicodedata.normalize("NFKC", text).lower()
    return _ARTICLES.sub(" ", "".join(filter(_counts, text))).split()


def _counts(char: str) -> bool:
    """Neither punctuation, of any script, nor a mark that shows nothing."""
    return char.isspace() or (char not in string.punctuation and unicodedata.category(char)[0] not in "PC")


def token_f1(response: str, truth: str) -> float:
    """Harmonic mean of precision and recall over word counts. A yes/no answer must match as a whole."""
    given, wanted = words(answer_part(without_end_tokens(response))), words(truth)
    if given != wanted and (" ".join(given) in _YES_NO or " ".join(wanted) in _YES_NO):
        return 0.0
    common = (Counter(given) & Counter(wanted)).total()
    if common == 0:
        return float(given == wanted)
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)
