"""The small expression language of the limit tables: integer arithmetic over named quantities.

Expressions are compiled once. They are evaluated with Python ints, or with SymInts of a ShapeEnv, by the same code, so
every function here must work on both and must not add a guard.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from types import CodeType
from typing import Any

import torch


def ceil_div(a: Any, b: int) -> Any:
    """a / b rounded up; b > 0."""
    return (a + b - 1) // b


def align(a: Any, b: int) -> Any:
    """a rounded up to a multiple of b; b > 0."""
    return ceil_div(a, b) * b


def _min(a: Any, b: Any) -> Any:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else torch.sym_min(a, b)


def _max(a: Any, b: Any) -> Any:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else torch.sym_max(a, b)


FUNCTIONS = {"align": align, "ceil_div": ceil_div, "min": _min, "max": _max}
_GLOBALS: dict[str, Any] = {"__builtins__": {}, **FUNCTIONS}
_ALLOWED = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Name, ast.Constant, ast.Load, ast.Call,
    ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Pow, ast.USub,
    ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.BoolOp, ast.And, ast.Or, ast.Not,
    ast.In, ast.NotIn, ast.Tuple,
)  # fmt: skip


class Expression:
    """A compiled expression and the names of the quantities it reads.

    Raises:
        ValueError: when the text is not an expression of the language.
    """

    def __init__(self, text: str) -> None:
        try:
            tree = ast.parse(text, mode="eval")
        except SyntaxError as error:
            raise ValueError(f"expression {text!r}: {error.msg}") from None
        for node in ast.walk(tree):
            if not isinstance(node, _ALLOWED):
                raise ValueError(f"expression {text!r}: {type(node).__name__} is not part of the language")
        self.text = text
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        self.names: frozenset[str] = frozenset(names - FUNCTIONS.keys())
        self._code: CodeType = compile(tree, f"<limit {text}>", "eval")
        self._name = tree.body.id if isinstance(tree.body, ast.Name) else None
        self._constant = tree.body.value if isinstance(tree.body, ast.Constant) else None

    def __call__(self, quantities: Mapping[str, Any]) -> Any:
        if self._name is not None:  # most expressions are one name or one number: ten times faster than eval
            return quantities[self._name]
        return self._constant if self._constant is not None else eval(self._code, _GLOBALS, quantities)

    def __repr__(self) -> str:
        return f"Expression({self.text!r})"


@functools.cache
def expression_of(text: str) -> Expression:
    """The expression of a text, one object for all rows: of 1,500 in the tables 400 differ.

    Raises:
        ValueError: as ``Expression``.
    """
    return Expression(text)
