"""Numbers as answers write them, read exactly: integers, decimals, fractions, mixed numbers, powers of ten, percent."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_LONGEST = 200
_LARGEST_EXPONENT = 400
_DECIMALS = 6
_CLOSE = Fraction(1, 100_000)

_DECIMAL = re.compile(r"(\d+\.?\d*|\.\d+)")
_FRACTION = re.compile(r"\\frac\{\s*(-?\d+)\s*\}\{\s*(-?\d+)\s*\}|(-?\d+)\s*/\s*(-?\d+)")
_MIXED = re.compile(r"(\d+)\s*\\frac\{\s*(\d+)\s*\}\{\s*(\d+)\s*\}")
_POWER = re.compile(r"(?:(\d+\.?\d*|\.\d+)\s*(?:\\times|\\cdot|\*)\s*)?10\s*\^\s*(?:\{\s*([+-]?\d+)\s*\}|([+-]?\d))")
_E_NOTATION = re.compile(r"(\d+\.?\d*|\.\d+)[eE]([+-]?\d+)")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?")


@dataclass(frozen=True)
class Literal:
    value: Fraction
    percent: bool = False
    rounded: bool = False
    """Written as a decimal, which may stand for a number with more digits."""


def read_literal(text: str) -> Literal | None:
    """The number that a normalised answer is, or None when it is something else."""
    text = text.strip()
    if len(text) > _LONGEST:
        return None
    percent = text.endswith("%")
    text = text.removesuffix("%").strip()
    sign = 1
    while text[:1] in ("-", "+"):
        sign, text = (-sign if text[0] == "-" else sign), text[1:].strip()
    while len(text) > 2 and (text[0], text[-1]) in (("(", ")"), ("{", "}")) and text[1:-1].isdigit():
        text = text[1:-1]
    value = _unsigned(text)
    if value is None:
        return None
    rounded = "." in text or bool(_E_NOTATION.fullmatch(text))
    return Literal(sign * value, percent, rounded and "\\" not in text)


def _unsigned(text: str) -> Fraction | None:
    if _DECIMAL.fullmatch(text):
        return Fraction(text.rstrip("."))
    if found := _FRACTION.fullmatch(text):
        numerator, denominator = (int(part) for part in found.groups() if part is not None)
        return Fraction(numerator, denominator) if denominator else None
    if found := _MIXED.fullmatch(text):
        whole, numerator, denominator = map(int, found.groups())
        return whole + Fraction(numerator, denominator) if denominator else None
    if found := _POWER.fullmatch(text):
        return _scaled(found[1] or "1", int(found[2] or found[3]))
    if found := _E_NOTATION.fullmatch(text):
        return _scaled(found[1], int(found[2]))
    if found := _REPEATING.fullmatch(text):
        whole, plain, period = found.groups()
        once = Fraction(int(f"0{whole}{plain}{period}") - int(f"0{whole}{plain}"), 10 ** len(period) - 1)
        return once / 10 ** len(plain)
    return None


def _scaled(digits: str, exponent: int) -> Fraction | None:
    return Fraction(digits) * Fraction(10) ** exponent if abs(exponent) <= _LARGEST_EXPONENT else None


def same_number(one: Literal, other: Literal) -> bool:
    """Equal; where one is a decimal, equal in six decimals and five digits, as 0.333333 is 1/3. 50 % is 50 and 0.5."""
    if one.percent != other.percent:
        written, plain = (one, other) if one.percent else (other, one)
        bare = Literal(written.value, rounded=written.rounded)
        return same_number(bare, plain) or same_number(Literal(written.value / 100, rounded=written.rounded), plain)
    if one.value == other.value:
        return True
    if not (one.rounded or other.rounded):
        return False
    apart, largest = abs(one.value - other.value), max(abs(one.value), abs(other.value))
    return round(one.value, _DECIMALS) == round(other.value, _DECIMALS) and apart <= _CLOSE * largest
