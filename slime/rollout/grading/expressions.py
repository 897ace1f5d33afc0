"""Whether two expressions are the same mathematics, with a parser of our own.

The parser below knows numbers, single-letter variables, + - * / ^ !, fractions, roots, a few functions and constants; it
builds sympy objects by itself. sympy's own string parsers are not used: they evaluate Python.
"""

from __future__ import annotations

import re

import sympy

LONGEST = 300
DEEPEST = 40
LARGEST_EXPONENT = 1000

_FUNCTIONS = {
    "sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan, "cot": sympy.cot, "sec": sympy.sec, "csc": sympy.csc,
    "arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan, "sinh": sympy.sinh, "cosh": sympy.cosh,
    "tanh": sympy.tanh, "ln": sympy.log, "log": sympy.log, "exp": sympy.exp,
}  # fmt: skip
_CONSTANTS = {"pi": sympy.pi, "infty": sympy.oo, "e": sympy.E, "i": sympy.I}
_GREEK = ("alpha", "beta", "gamma", "delta", "theta", "lambda", "mu", "phi", "omega", "rho", "sigma", "tau", "epsilon")
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+\.?\d*|\.\d+)|\\(?P<command>[A-Za-z]+)|(?P<word>sqrt|sin|cos|tan|log|ln|exp|pi)|(?P<char>.))"
)
_IGNORED = ("left", "right", "displaystyle")


class CannotRead(ValueError):
    """The text is not an expression of the small language."""


def tokens_of(text: str) -> list[tuple[str, str]]:
    if len(text) > LONGEST:
        raise CannotRead("too long")
    found = []
    for match in _TOKEN.finditer(text.strip()):
        kind = match.lastgroup
        if not (kind == "command" and match[kind] in _IGNORED):
            found.append((("command" if kind == "word" else kind), match[kind]))
    return found


class Parser:
    """Recursive descent: sum > product (implicit, too) > sign > power > factorial > atom."""

    def __init__(self, text: str):
        self.tokens = [*tokens_of(text), ("end", "")]
        self.position = 0
        self.depth = 0

    def parse(self) -> sympy.Expr:
        value = self.sum()
        if self.peek()[0] != "end":
            raise CannotRead(f"unexpected {self.peek()[1]!r}")
        return value

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.position]

    def take(self) -> tuple[str, str]:
        token = self.tokens[self.position]
        self.position += 1
        return token

    def accept(self, *options: tuple[str, str]) -> bool:
        if self.peek() in options:
            self.position += 1
            return True
        return False

    def expect(self, char: str) -> None:
        if not self.accept(("char", char)):
            raise CannotRead(f"expected {char!r}, found {self.peek()[1]!r}")

    def sum(self) -> sympy.Expr:
        self.depth += 1
        if self.depth > DEEPEST:
            raise CannotRead("too deep")
        value = self.product()
        while True:
            if self.accept(("char", "+")):
                value = value + self.product()
            elif self.accept(("char", "-")):
                value = value - self.product()
            else:
                self.depth -= 1
                return value

    def product(self) -> sympy.Expr:
        value = self.signed()
        while True:
            if self.accept(("char", "*"), ("command", "cdot"), ("command", "times")):
                value = value * self.signed()
            elif self.accept(("char", "/"), ("command", "div")):
                value = value / self.signed()
            elif self.starts_atom():
                value = value * self.power()
            else:
                return value

    def starts_atom(self) -> bool:
        kind, text = self.peek()
        if kind == "command":
            return text not in ("cdot", "times", "div", "pm")
        return kind == "number" or (kind == "char" and (text.isalpha() or text in "({["))

    def signed(self) -> sympy.Expr:
        if self.accept(("char", "-")):
            return -self.signed()
        if self.accept(("char", "+")):
            return self.signed()
        return self.power()

    def power(self) -> sympy.Expr:
        base = self.postfix()
        if self.accept(("char", "^")) or self.accept_double_star():
            exponent = self.group() if self.peek() == ("char", "{") else self.signed()
            if exponent.is_number and abs(sympy.N(exponent, 8)) > LARGEST_EXPONENT:
                raise CannotRead("exponent too large")
            return base**exponent
        return base

    def accept_double_star(self) -> bool:
        if self.peek() == ("char", "*") and self.tokens[self.position + 1] == ("char", "*"):
            self.position += 2
            return True
        return False

    def postfix(self) -> sympy.Expr:
        value = self.atom()
        while self.accept(("char", "!")):
            if not (value.is_Integer and 0 <= value <= 200):
                raise CannotRead("factorial of something large or not whole")
            value = sympy.factorial(value)
        return value

    def group(self) -> sympy.Expr:
        self.expect("{")
        value = self.sum()
        self.expect("}")
        return value

    def argument(self) -> sympy.Expr:
        """What follows \\sqrt or \\frac: a group, or one digit or letter."""
        if self.peek() == ("char", "{"):
            return self.group()
        kind, text = self.peek()
        if kind == "number" and len(text) > 1 and "." not in text:
            self.tokens[self.position] = (kind, text[1:])
            return sympy.Integer(text[0])
        return self.atom()

    def atom(self) -> sympy.Expr:
        kind, text = self.take()
        if kind == "number":
            return sympy.Rational(text.rstrip("."))
        if kind == "char":
            for opening, closing in ("()", "{}", "[]"):
                if text == opening:
                    value = self.sum()
                    self.expect(closing)
                    return value
            if text == "|":
                value = self.sum()
                self.expect("|")
                return sympy.Abs(value)
            if text.isalpha():
                return _CONSTANTS.get(text) or sympy.Symbol(text)
        if kind == "command":
            return self.command(text)
        raise CannotRead(f"unexpected {text!r}")

    def command(self, name: str) -> sympy.Expr:
        if name == "frac":
            numerator = self.argument()
            return numerator / self.argument()
        if name == "sqrt":
            if self.accept(("char", "[")):
                degree = self.sum()
                self.expect("]")
                return sympy.root(self.argument(), degree)
            if self.peek() == ("char", "("):
                return sympy.sqrt(self.atom())
            return sympy.sqrt(self.argument())
        if name in _FUNCTIONS:
            return self.function(name)
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        if name in _GREEK:
            return sympy.Symbol(name)
        raise CannotRead(f"unknown command \\{name}")

    def function(self, name: str) -> sympy.Expr:
        base = None
        if name == "log" and self.accept(("char", "_")):
            base = self.argument()
        exponent = None
        if self.accept(("char", "^")):
            exponent = self.argument()
        inner = self.power()
        value = sympy.log(inner, base) if base is not None else _FUNCTIONS[name](inner)
        return value if exponent is None else value**exponent


def sides(text: str) -> tuple[sympy.Expr, sympy.Expr | None]:
    """An expression, or the two sides of an equation."""
    left, equals, right = text.partition("=")
    if not equals:
        return Parser(left).parse(), None
    return Parser(left).parse(), Parser(right).parse()


def is_zero(difference: sympy.Expr) -> bool:
    if difference.is_number:
        return bool(sympy.simplify(difference) == 0) or difference.equals(0) is True
    return bool(sympy.simplify(difference) == 0)


def equal(left: str, right: str) -> bool:
    try:
        (a, a_right), (b, b_right) = sides(left), sides(right)
    except (CannotRead, IndexError, RecursionError, ZeroDivisionError):
        return False
    if (a_right is None) != (b_right is None):
        return False
    try:
        if a_right is None:
            return is_zero(a - b)
        # Two equations say the same when one is a constant multiple of the other.
        ratio = sympy.simplify((a - a_right) / (b - b_right))
        return bool(ratio.is_number and ratio.is_finite and ratio != 0)
    except (TypeError, ValueError, ArithmeticError, AttributeError, NotImplementedError):
        return False
