"""sympy in processes that grade: a text is a number or a name, or it is refused; it is never Python.

`sympify(text)` hands any text to Python's eval(), and latex2sympy2_extended 1.11 calls it for every number that it reads
(`latex2sympy2.py:1026`, `Number(text)`). sympy 1.5 to 1.14, https://docs.sympy.org/latest/modules/core.html#sympy.core.sympify.sympify
("this function uses eval, and thus shouldn't be used on unsanitized input").
`tests/rollout/test_mathematics.py::test_sympy_still_evaluates_a_text` fails when that is obsolete.
"""

from __future__ import annotations

import re
from typing import Any

_WHOLE = re.compile(r"\d{1,4000}")
_DECIMAL = re.compile(r"\d{0,4000}\.\d{0,4000}")
_NAME = re.compile(r"[A-Za-z]\w{0,80}")


def no_text_is_evaluated() -> None:
    """From here on numbers and names of a text are read here, and any other text is a ValueError, in the whole process."""
    from sympy import Expr, Float, Integer, Symbol
    from sympy.parsing import sympy_parser

    def read(text: str, *args: Any, **kwargs: Any) -> Expr:
        text = text.strip()
        if _WHOLE.fullmatch(text):
            return Integer(int(text))
        if _DECIMAL.fullmatch(text) and text != ".":
            return Float(text)
        if _NAME.fullmatch(text):  # sympy names its own units so, when it imports them late
            return Symbol(text)
        raise ValueError(f"sympy was asked to evaluate the text {text[:80]!r}; only numbers and names are read here")

    sympy_parser.parse_expr = read
    sympy_parser.eval_expr = read
