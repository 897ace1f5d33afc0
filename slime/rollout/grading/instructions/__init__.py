"""Instructions that a program can check (`ifbench`): those of IFEval (arXiv 2311.07911) and of IFBench (arXiv 2507.02833).

`CHECKS` maps an instruction id of those data sets to a function (response, **kwargs of the row) -> whether it was followed.
The rules are the data sets' own; what they take from NLTK's downloaded data (words and sentences) is cut by `text.py` here. An
id that needs more than that is in `NOT_CHECKED`, with the reason: a row that names it is refused, not scored.
"""

from __future__ import annotations

from slime.rollout.grading.instructions import custom, formats, ifeval, sentences, words
from slime.rollout.grading.instructions.text import Check

CHECKS: dict[str, Check] = {**ifeval.CHECKS, **words.CHECKS, **sentences.CHECKS, **formats.CHECKS, **custom.CHECKS}

NOT_CHECKED = {
    "ratio:stop_words": "it counts NLTK's list of stop words, which is not part of any package",
    "words:start_verb": "it needs a tagger of parts of speech",
    "words:odd_even_syllables": "it needs a dictionary of syllables",
}
"""Instruction id -> why no check is here."""
