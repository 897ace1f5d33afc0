"""Small arithmetic on whole numbers and lists, read with ast: the `[0]*3+[1]*75` of --moe-layer-freq. Nothing is executed."""

from __future__ import annotations

import ast

LONGEST_LIST = 100_000


def evaluate(text: str) -> int | float | list:
    """The value of an expression of numbers, lists, + - * and **. Raises ValueError for anything else."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(f"cannot read {text!r}: {error.msg}") from None
    try:
        return _value(tree.body)
    except (TypeError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"cannot work out {text!r}: {error}") from None


def _value(node: ast.expr) -> int | float | list:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)  # type: ignore[operator]
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Add):
            return left + right  # type: ignore[operator]
        if isinstance(node.op, ast.Sub):
            return left - right  # type: ignore[operator]
        if isinstance(node.op, ast.Mult):
            times = next((x for x in (left, right) if isinstance(x, int)), 1)
            size = max(len(x) if isinstance(x, list) else 0 for x in (left, right))
            if times * size > LONGEST_LIST:
                raise ValueError(f"a list of {times * size} entries is too long (most: {LONGEST_LIST})")
            return left * right  # type: ignore[operator]
        if isinstance(node.op, ast.Pow) and isinstance(left, int) and isinstance(right, int) and 0 <= right <= 64:
            return left**right
    raise ValueError(f"only numbers, lists, +, -, * and ** may be used, found {ast.unparse(node)!r}")


def layer_frequency(text: str) -> int | list[int]:
    """`2` (every second layer) or a list with one 0 or 1 per layer, as `[0]*3+[1]*75` or `0,0,1`."""
    value = evaluate(text)
    if isinstance(value, list) and all(item in (0, 1) for item in value) and value:
        return [int(item) for item in value]
    if isinstance(value, int) and value > 0:
        return value
    raise ValueError(f"wants a whole number above 0 or a list of 0 and 1 per layer, like [0]*3+[1]*75; got {text!r}")
