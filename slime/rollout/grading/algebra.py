"""Whether two expressions are the same mathematics: math-verify's parser reads them, numbers or math-verify compare them.

Both libraries are used for what they do best. Two expressions are compared by their values at a few points, to 60 digits: fast,
and no near miss passes. Relations, sets, intervals and matrices, and expressions that the points leave open, go to math-verify.
Nothing that a model wrote is evaluated: the parser is a grammar, and sympy's own is shut (`slime.compat.sympy_text`).
"""

from __future__ import annotations

import logging
import math
from functools import lru_cache

import sympy
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from math_verify import verify
from math_verify.grader import should_treat_as_complex
from sympy.logic.boolalg import BooleanAtom
from sympy.matrices import MatrixBase

from slime.compat.sympy_text import no_text_is_evaluated

_LONGEST = 300
_DEEPEST = 25
_MOST_DIGITS = 100_000
_DIGITS = 60
_EXACT, _ROUNDED = sympy.Float("1e-50"), sympy.Float("1e-6")
# Positive, far from integers and from each other: no two different answers of a textbook agree at all three by accident.
_POINTS = ((3, 7), (11, 13), (29, 17))
_WRITTEN = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
)

no_text_is_evaluated()
for _name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # it warns that its alarms are off; the pool has time-outs of its own


@lru_cache(maxsize=512)
def read(text: str, is_real: bool) -> sympy.Basic | MatrixBase | None:
    """None when it is not mathematics that the grammar knows."""
    if len(text) > _LONGEST or not _is_balanced(text):
        return None
    try:
        found = latex2sympy(normalize_latex(text, _WRITTEN), is_real=is_real, convert_degrees=False, normalization_config=None)
    except RecursionError:
        return None
    except Exception:  # the grammar and its converter raise bare Exceptions and whatever sympy raises
        return None
    return found if isinstance(found, sympy.Basic | MatrixBase) and not _is_huge(found) else None


def _is_balanced(text: str) -> bool:
    """Braces close and brackets are not nested absurdly deep: the grammar takes seconds to find that out for itself."""
    braces = depth = 0
    for char in text:
        braces += {"{": 1, "}": -1}.get(char, 0)
        depth += {"{": 1, "(": 1, "[": 1, "}": -1, ")": -1, "]": -1}.get(char, 0)
        if braces < 0 or depth > _DEEPEST:
            return False
    return braces == 0


def same_expression(given: str, wanted: str) -> bool:
    """Whether two normalised answers are the same. One that cannot be read, or is astronomically large, is not."""
    is_real = not (should_treat_as_complex(given) or should_treat_as_complex(wanted))
    one, other = read(given, is_real), read(wanted, is_real)
    if one is None or other is None:
        return False
    if _is_expression(one) and _is_expression(other):
        by_value = _same_values(_with_i(one), _with_i(other))
        if by_value is not None:
            return by_value
    return bool(verify(other, one, strict=True, allow_set_relation_comp=True, timeout_seconds=None))


def _is_expression(value: sympy.Basic | MatrixBase) -> bool:
    return isinstance(value, sympy.Expr) and not isinstance(value, MatrixBase | sympy.MatrixExpr | BooleanAtom)


def _with_i(value: sympy.Expr) -> sympy.Expr:
    return value.xreplace({symbol: sympy.I for symbol in value.free_symbols if symbol.name == "i"})


def _same_values(one: sympy.Expr, other: sympy.Expr) -> bool | None:
    """None where values decide nothing: poles, infinities, unevaluated integrals, a difference at negative points alone."""
    rounded = one.has(sympy.Float) or other.has(sympy.Float)
    names = sorted({symbol.name for symbol in one.free_symbols | other.free_symbols})
    if not names:
        return _agree(one, other, {}, rounded)
    for shift, (first, second) in enumerate(_POINTS):
        point = {name: sympy.Rational(first + 5 * place, second + 2 * shift) for place, name in enumerate(names)}
        found = _agree(one, other, point, rounded)
        if not found:
            return found
    negative = {name: -sympy.Rational(7 + 4 * place, 5) for place, name in enumerate(names)}
    return True if _agree(one, other, negative, rounded) else None


def _agree(one: sympy.Expr, other: sympy.Expr, point: dict[str, sympy.Rational], rounded: bool) -> bool | None:
    values = [_value_at(expression, point) for expression in (one, other)]
    if None in values:
        return None
    apart, largest = abs(values[0] - values[1]), max(abs(values[0]), abs(values[1]))
    return bool(apart <= (_ROUNDED if rounded else _EXACT) * largest)


def _value_at(expression: sympy.Expr, point: dict[str, sympy.Rational]) -> sympy.Expr | None:
    """A finite number of 60 digits, or None."""
    placed = expression.xreplace({symbol: point[symbol.name] for symbol in expression.free_symbols})
    if placed.has(sympy.Integral, sympy.Derivative, sympy.Sum, sympy.Product, sympy.Limit):
        return None
    try:
        value = placed.replace(_is_odd_root_of_negative, _real_root).evalf(_DIGITS)
    except (ArithmeticError, ValueError, TypeError, AttributeError, NotImplementedError):
        return None
    finite = value.is_number and not value.has(sympy.nan, sympy.zoo, sympy.oo, sympy.S.NegativeInfinity)
    return value if finite and all(part.is_Float or part.is_Number for part in value.as_real_imag()) else None


def _is_odd_root_of_negative(value: sympy.Basic) -> bool:
    exponent = value.exp if isinstance(value, sympy.Pow) else None
    return bool(isinstance(exponent, sympy.Rational) and exponent.q > 1 and exponent.q % 2 and value.base.is_negative)


def _real_root(power: sympy.Pow) -> sympy.Expr:
    """The cube root of -8 is -2 to whoever writes it; sympy's is complex."""
    return (-1) ** power.exp.p * (-power.base) ** power.exp


def _is_huge(value: sympy.Basic | MatrixBase) -> bool:
    """Whether writing a number in it out would take more than 100,000 digits: 9^9^9^9, or a factorial of a million."""
    parts = value.flat() if isinstance(value, MatrixBase) else [value]
    return any(_num_digits(part) > _MOST_DIGITS for part in parts)


def _num_digits(value: sympy.Basic) -> float:
    """An upper bound, without evaluating anything."""
    if isinstance(value, sympy.Integer):
        return math.log10(abs(int(value)) + 1)
    if isinstance(value, sympy.Number | sympy.Symbol) or not value.args:
        return 1.0
    sizes = [_num_digits(part) for part in value.args]
    if isinstance(value, sympy.Pow) and value.exp.is_number:
        return math.inf if sizes[1] > 6 else max(1.0, sizes[0]) * 10 ** sizes[1] if value.base.is_number else sizes[0]
    if isinstance(value, sympy.factorial):
        return math.inf if sizes[0] > 6 else 10 ** sizes[0] * max(1.0, sizes[0])
    return sum(sizes)
