"""Whether an answer is the label: the same spelling, the same number, the same items, or the same algebra, in this order."""

from __future__ import annotations

import re
from dataclasses import dataclass

from slime.rollout.grading.literals import read_literal, same_number
from slime.rollout.grading.response import last_boxed, without_end_tokens
from slime.rollout.grading.spelling import has_period, normalise, split_unit

_LONGEST = 2_000
"""Of a longer answer only the spelling is compared."""
_DEEPEST = 4
_NAME = r"[A-Za-z](?:_\{?\w+\}?)?(?:\s*\(\s*[a-z]\s*\))?"
_ASSIGNED = re.compile(
    rf"(?P<name>\(\s*{_NAME}(?:\s*,\s*{_NAME})+\s*\)|{_NAME})\s*(?:=|\\(?:in|equiv)(?![A-Za-z]))\s*(?P<value>.+)"
)
_BASE = re.compile(r"([0-9A-Fa-f]+)_(\d+)")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_MATRIX = re.compile(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}")
_SIGNS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
_MODULUS = re.compile(r"(?P<value>.+?)\s*\(?\\(?:pmod|mod|bmod|text\s*\{\s*\(?mod)\s*[{}]?\s*(?P<modulus>\w+)[\s{})]*")
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"(?<=\d)\s*(?:\\text\s*\{{\s*)?(?P<word>{'|'.join(_SCALES)})(?:\s*\}})?(?![A-Za-z])", re.IGNORECASE)
"""2.5 million is 2500000, and 2.5 where the question asks for millions, as with percent."""
_WORD = re.compile(r"[A-Za-z][A-Za-z' -]*")


def grade_math(response: str, label: str) -> bool:
    """Whether the last box of the response is the label, or what the label's own box holds. No box, or an open one: wrong."""
    given = last_boxed(without_end_tokens(response))
    return given is not None and same_answer(given, answer_of(label))


def answer_of(label: str) -> str:
    """A label is an answer, or a solution that ends with one: in a box, or behind GSM8K's ####."""
    return last_boxed(label) or label.rpartition("####")[2].strip() or label


def same_answer(given: str, wanted: str) -> bool:
    """Whether two answers are the same mathematics. An empty one is nothing's equal."""
    if _compact(given) == _compact(wanted):
        return bool(_compact(given))
    if max(len(given), len(wanted)) > _LONGEST:
        return False
    if _same_spelled(normalise(given), normalise(wanted)):
        return True
    # 0.577... may be a period and may be cut off.
    either = has_period(given) or has_period(wanted)
    return either and _same_spelled(normalise(given, periods=False), normalise(wanted, periods=False))


def _same_spelled(given: str, wanted: str) -> bool:
    scales = len(_SCALE.findall(given)), len(_SCALE.findall(wanted))
    if not any(scales):
        return _same(given, wanted, depth=0)
    if _same(_SCALE.sub(_power_of_ten, given), _SCALE.sub(_power_of_ten, wanted), depth=0):
        return True
    return not all(scales) and _same(_SCALE.sub("", given), _SCALE.sub("", wanted), depth=0)


def _power_of_ten(found: re.Match) -> str:
    return rf"\times 10^{{{_SCALES[found['word'].lower()]}}}"


def _compact(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _same(given: str, wanted: str, *, depth: int) -> bool:
    if depth > _DEEPEST or not given.strip() or not wanted.strip():
        return False
    if _compact(given) == _compact(wanted):
        return True
    if _compact(_TEXT.sub(r"\1", given)) == _compact(_TEXT.sub(r"\1", wanted)):
        return True
    if _WORD.fullmatch(given) and _WORD.fullmatch(wanted) and given.lower() == wanted.lower():
        return True
    (given, given_unit), (wanted, wanted_unit) = split_unit(given), split_unit(wanted)
    if given_unit and wanted_unit and given_unit != wanted_unit:
        return False
    given, wanted = _values(given, wanted)
    if _compact(given) == _compact(wanted):
        return True
    moduli = _MODULUS.fullmatch(given), _MODULUS.fullmatch(wanted)
    if any(moduli) and (not all(moduli) or moduli[0]["modulus"] == moduli[1]["modulus"]):
        # As with a base: a question about remainders need not have its modulus repeated.
        given, wanted = (found["value"] if found else text for found, text in zip(moduli, (given, wanted), strict=True))
    literals = read_literal(given), read_literal(wanted)
    if None not in literals:
        return same_number(*literals)
    bases = _BASE.fullmatch(given), _BASE.fullmatch(wanted)
    if any(bases):
        return _same_in_base(given, wanted, *bases)
    matrices = _cells(given), _cells(wanted)
    if None not in matrices:
        return _same_cells(*matrices, depth=depth)
    signed = _with_signs(given), _with_signs(wanted)
    if None not in signed and _SIGNS.search(given + wanted):
        return _same_in_any_order(*signed, depth=depth)
    items = _items(given), _items(wanted)
    if None not in items:
        return _same_items(*items, depth=depth)
    pieces = _alternatives(given), _alternatives(wanted)
    if None not in pieces and ("\\cup" in given) != ("\\cup" in wanted):
        return _same_in_any_order(*pieces, depth=depth)
    if None not in pieces and _same_in_any_order(pieces[0], [*pieces[1]], depth=depth):
        return True
    return _same_algebra(given, wanted)


def _with_signs(text: str) -> list[str] | None:
    """1 \\pm a as 1+a and 1-a; None where two signs of one value may or may not go together."""
    text = text.strip()
    members = text[2:-2] if text.startswith("\\{") and text.endswith("\\}") else text
    found = _items(members)
    signed: list[str] = []
    for item in found.items if found and not found.brackets else [members]:
        signs = _SIGNS.findall(item)
        if len(signs) > 1:
            return None
        signed.extend([_SIGNS.sub("+", item), _SIGNS.sub("-", item)] if signs else [item])
    return signed


def _alternatives(text: str) -> list[str] | None:
    """What may hold: x < -1, x > 1 are two conditions, and so are the intervals of a union."""
    if "\\cup" in text:
        return re.split(r"\\cup(?![A-Za-z])", re.sub(r"^\s*[A-Za-z]\s*\\in(?![A-Za-z])", "", text))
    found = _items(text)
    return list(found.items) if found and not found.brackets and all(map(_is_relation, found.items)) else None


def _same_algebra(given: str, wanted: str) -> bool:
    # Here and not above: sympy and the grammar take a second to import, and most answers are decided before.
    from slime.rollout.grading.algebra import same_expression

    return same_expression(given, wanted)


def _values(given: str, wanted: str) -> tuple[str, str]:
    """x = 5 and 5 are one answer, and so are x = 5 and x = 5; x = 5 and y = 5 are not."""
    found = _assigned(given), _assigned(wanted)
    if all(found) and _compact(found[0]["name"]) == _compact(found[1]["name"]):
        return found[0]["value"], found[1]["value"]
    if found[0] and not found[1] and not _is_relation(wanted):
        return found[0]["value"].rpartition("=")[2], wanted
    if found[1] and not found[0] and not _is_relation(given):
        return given, found[1]["value"].rpartition("=")[2]
    return given, wanted


def _assigned(text: str) -> re.Match | None:
    found = _ASSIGNED.fullmatch(text)
    # x = 1, x = 2 is a list of two, not one assignment.
    return None if found is None or re.search(r"[,;].*=", found["value"]) else found


def _is_relation(text: str) -> bool:
    return bool(re.search(r"[=<>]|\\(?:le|ge|ne|lt|gt|in)(?![A-Za-z])", text))


def _same_in_base(given: str, wanted: str, one: re.Match | None, other: re.Match | None) -> bool:
    """Digits in a base. The base may be left out, as a question that asks for base 8 does not need it repeated."""
    digits = (one[1] if one else given).lstrip("0").lower(), (other[1] if other else wanted).lstrip("0").lower()
    return digits[0] == digits[1] and (one is None or other is None or one[2] == other[2])


# -------------------------------------------------------------------------------------------------- matrices and lists


def _cells(text: str) -> list[list[str]] | None:
    found = _MATRIX.fullmatch(text.strip())
    if found is None:
        return None
    rows = [row for row in re.split(r"\\\\(?:\s*\[[^\]]*\])?", found[1]) if row.strip()]
    return [[cell.strip() for cell in row.split("&")] for row in rows]


def _same_cells(one: list[list[str]], other: list[list[str]], *, depth: int) -> bool:
    if [len(row) for row in one] != [len(row) for row in other]:
        return False
    pairs = [pair for rows in zip(one, other, strict=True) for pair in zip(*rows, strict=True)]
    return all(_same(left, right, depth=depth + 1) for left, right in pairs)


@dataclass(frozen=True)
class _Items:
    brackets: str
    """`()`, `[)`, ..., `{}` for a set, empty for a bare list."""
    items: tuple[str, ...]


def _items(text: str) -> _Items | None:
    """What commas at depth 0 separate; None when they separate nothing."""
    text = text.strip()
    brackets, inner = "", text
    if text.startswith("\\{") and text.endswith("\\}"):
        brackets, inner = "{}", text[2:-2]
    elif text[:1] in "([" and text[-1:] in ")]" and _closes_at_the_end(text):
        brackets, inner = text[0] + text[-1], text[1:-1]
    items, depth, start, position = [], 0, 0, 0
    while position < len(inner):
        char = inner[position]
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(char, 0)
        if char in ",;" and depth == 0:
            items.append(inner[start:position].strip())
            start = position + 1
        position += 1
    if not items:
        return None
    return _Items(brackets, (*items, inner[start:].strip()))


def _closes_at_the_end(text: str) -> bool:
    depth = 0
    for position, char in enumerate(text):
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(char, 0)
        if depth == 0:
            return position == len(text) - 1
    return False


_UNORDERED = ("", "{}")


def _same_items(one: _Items, other: _Items, *, depth: int) -> bool:
    """Sets and bare lists in any order, tuples and intervals in theirs; a bare list also as the coordinates of a point."""
    if one.brackets == other.brackets == "{}":
        one, other = _without_repeats(one), _without_repeats(other)
    if len(one.items) != len(other.items):
        return False
    in_order = all(_same(left, right, depth=depth + 1) for left, right in zip(one.items, other.items, strict=True))
    if one.brackets in _UNORDERED and other.brackets in _UNORDERED:
        return in_order or _same_in_any_order(list(one.items), list(other.items), depth=depth)
    same_brackets = one.brackets == other.brackets or {one.brackets, other.brackets} == {"", "()"}
    return in_order and same_brackets


def _without_repeats(found: _Items) -> _Items:
    return _Items(found.brackets, tuple({_compact(item): item for item in found.items}.values()))


def _same_in_any_order(one: list[str], other: list[str], *, depth: int) -> bool:
    if len(one) != len(other):
        return False
    for item in one:
        match = next((candidate for candidate in other if _same(item, candidate, depth=depth + 1)), None)
        if match is None:
            return False
        other.remove(match)
    return True
