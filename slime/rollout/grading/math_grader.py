"""Mathematical answers: find the last \\boxed{}, bring both sides into one spelling, compare.

`grade_math` decides by spelling and exact numbers alone. `equal_answers(symbolic=True)` also asks sympy, in a process of its
own with a time-out and a parser that knows mathematics only: model text is never evaluated as code.
"""

from __future__ import annotations

import re
from fractions import Fraction

from slime.rollout.grading.expressions import equal as symbolically_equal

_BOXED = re.compile(r"\\(?:boxed|fbox)(?P<rest>\s*\{|\s+\S)")
_SPACES = ("\\!", "\\,", "\\;", "\\:", "\\ ", "\\quad", "\\qquad", "~")
_UNITS = (
    "degrees?", "dollars?", "cents?", "units?", "inches", "inch", "feet", "foot", "miles?", "hours?", "minutes?", "seconds?",
    "days?", "years?", "meters?", "metres?", "cm", "km", "kg", "mph", "points?", "people", "square", "ways",
)  # fmt: skip
_UNIT = re.compile(rf"(?<=[\d}}\])])\s*\b(?:{'|'.join(_UNITS)})\b\.?$")


def last_boxed(text: str) -> str | None:
    """Content of the last \\boxed{...} or \\fbox{...} whose braces close, or of `\\boxed x`; None if there is none."""
    for match in reversed(list(_BOXED.finditer(text))):
        if not match["rest"].rstrip().endswith("{"):
            return text[match.end() - 1 :].split("$")[0].split()[0]
        depth = 1
        for position in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[match.end() : position].strip()
    return None


def normalise(answer: str) -> str:
    """One spelling: no decoration, units, spaces or thousands separators; \\frac and \\sqrt with braces; a/b as
    \\frac{a}{b}."""
    text = answer.strip().replace("\n", " ")
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{\s*(?:and|or)\s*\}", ",", text)
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = text.replace("\\left", "").replace("\\right", "").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    for space in _SPACES:
        text = text.replace(space, " ")
    text = text.replace("\\$", "").replace("$", "").replace("\\%", "").replace("%", "")
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|°", "", text).rstrip(". ")
    text = _UNIT.sub("", text.strip())
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\s+", "", text)
    text = re.sub(r"^[a-zA-Z]=(?=.)", "", text)
    text = re.sub(r"\\sqrt(?![\[{])(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac(?!\{)(\w)(\w)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(?!\{)(\w)\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\{[^{}]*\})(\w)(?!\w)", r"\1{\2}", text)
    text = re.sub(r"^(-?)(\d+)/(-?\d+)$", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"(?<!\d)\.(\d)", r"0.\1", text)
    return text.lower() if re.fullmatch(r"\(?[A-Za-z]\)?|[A-Za-z]+", text) else text


_FRACTION = re.compile(r"(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}")
_MIXED = re.compile(r"(-?)(\d+)\\frac\{(\d+)\}\{(\d+)\}")
_LONGEST_NUMBER = 200


def exact_number(text: str) -> Fraction | None:
    """The rational number that a normalised answer spells, or None."""
    if len(text) > _LONGEST_NUMBER:
        return None
    text = text.removeprefix("+")
    if re.fullmatch(r"-?(\d+\.?\d*|\.\d+)", text):
        return Fraction(text.rstrip("."))
    for pattern in (_FRACTION, _MIXED):
        match = pattern.fullmatch(text)
        if match is None:
            continue
        sign, *parts = match.groups()
        *whole, numerator, denominator = map(int, parts)
        if denominator == 0:
            return None
        value = Fraction(numerator, denominator) + (whole[0] if whole else 0)
        return -value if sign else value
    return None


def _split_tuple(text: str) -> list[str] | None:
    """Items of (a, b), [a, b], {a, b} or a, b, at depth 0; None when there is one item."""
    inner = text[1:-1] if text[:1] in "([" and text[-1:] in ")]" else text
    inner = inner[2:-2] if inner.startswith("\\{") and inner.endswith("\\}") else inner
    items, depth, start = [], 0, 0
    for position, char in enumerate(inner):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(char, 0)
        if char == "," and depth == 0:
            items.append(inner[start:position])
            start = position + 1
    return [*items, inner[start:]] if items else None


def equal_answers(given: str, wanted: str, *, symbolic: bool = False) -> bool:
    """Whether two answers are the same mathematics."""
    left, right = normalise(given), normalise(wanted)
    if not left or not right:
        return False
    if left == right:
        return True
    numbers = exact_number(left), exact_number(right)
    if None not in numbers:
        return numbers[0] == numbers[1]
    left_items, right_items = _split_tuple(left), _split_tuple(right)
    if left_items is not None or right_items is not None:
        if left_items is None or right_items is None or len(left_items) != len(right_items):
            return False
        # The brackets of an interval matter: (1, 2] is not [1, 2].
        brackets = [(side[0], side[-1]) if side[0] in "([" else ("", "") for side in (left, right)]
        if brackets[0] != brackets[1] and "" not in brackets[0] + brackets[1]:
            return False
        return all(equal_answers(a, b, symbolic=symbolic) for a, b in zip(left_items, right_items, strict=True))
    return symbolic and symbolically_equal(left, right)


def grade_math(response: str, label: str, *, symbolic: bool = False) -> bool:
    """Whether the last \\boxed{} of the response is the label (or the label's own \\boxed{}). No box: wrong."""
    given = last_boxed(response)
    if given is None:
        return False
    return equal_answers(given, last_boxed(label) or label, symbolic=symbolic)
