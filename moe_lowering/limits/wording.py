"""Sentences about numbers and expressions, which become text or JSON only when the user's names of the symbols are known.

Violations, sizes and reasons hold their quantities as they are (``Wording``, ``Accepted``); nothing else in the package turns
a symbolic size into text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import sympy
import torch
from sympy.printing.str import StrPrinter

# (symbol as the ShapeEnv calls it, name that the user knows it by), e.g. ("s77", "input_ids.shape[1]").
Names: TypeAlias = tuple[tuple[str, str], ...]
# What a rule looks at: a number, a word, or an expression in the symbols of sizes. Hashable, and free of any ShapeEnv.
Value: TypeAlias = bool | int | float | str | sympy.Expr | None
NUMBERS = (bool, int, float, type(None))  # as JSON has them


def as_value(size: Any) -> Any:
    """A SymInt as its expression, or as the number that it is known to be; anything else as it is."""
    if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return size
    expression = size.node.expr
    return int(expression) if isinstance(expression, sympy.Integer) else expression


class _Printer(StrPrinter):
    """Expressions with the user's names. Nothing is put in place of a symbol: two symbols may have one name."""

    def __init__(self, names: Names) -> None:
        super().__init__()
        self._names = dict(names)

    def _print_Symbol(self, symbol: sympy.Symbol) -> str:
        return self._names.get(symbol.name, symbol.name)


def show(value: Any, names: Names = ()) -> str:
    """A value as text; a tuple of values as a shape is written."""
    if isinstance(value, sympy.Basic):
        return str(_Printer(names).doprint(value))
    if isinstance(value, tuple):
        return f"({', '.join(show(each, names) for each in value)}{',' if len(value) == 1 else ''})"
    return value.say(names) if hasattr(value, "say") else str(value)


def show_word(value: Any, names: Names = ()) -> str:
    """As ``show``, of a value by itself: an empty word, as mc2's comm_alg may be, is seen."""
    return show(value, names) or '""'


def names_in(names: Names, *values: Any) -> Names:
    """The names of the symbols that stand in some values."""
    symbols = {symbol.name for value in values if isinstance(value, sympy.Basic) for symbol in value.free_symbols}
    return tuple((symbol, name) for symbol, name in names if symbol in symbols)


def to_json(value: Value, names: Names = ()) -> bool | int | float | str | None:
    """A number as a number, anything else as text."""
    return value if isinstance(value, NUMBERS) else show(value, names)


@dataclasses.dataclass(frozen=True)
class Wording:
    """A sentence with quantities in braces, and the quantities: values, tuples of them, or other objects that can be
    put into words."""

    template: str
    shown: tuple[tuple[str, Any], ...] = ()

    def say(self, names: Names = ()) -> str:
        return self.template.format_map({name: show(value, names) for name, value in self.shown})

    def __str__(self) -> str:
        return self.say()


def make_wording(template: str, **shown: Any) -> Wording:
    """A sentence; sizes may be SymInts, and shapes tuples of them."""
    return Wording(template, tuple((name, _as_plain(value)) for name, value in shown.items()))


def _as_plain(value: Any) -> Any:
    return tuple(map(as_value, value)) if isinstance(value, tuple) else as_value(value)


@dataclasses.dataclass(frozen=True)
class Quoted:
    """A text from elsewhere, e.g. of an exception of torch: it is kept as it is, and the symbols in it are explained after it."""

    text: str

    def say(self, names: Names = ()) -> str:
        legend = ", ".join(f"{symbol} is {name}" for symbol, name in names if symbol in self.text)
        return f"{self.text} ({legend})" if legend else self.text


@dataclasses.dataclass(frozen=True)
class Bound:
    """One bound of a rule: its value, and the expression of the table that gave it."""

    value: Value
    expression: str

    def say(self, names: Names = ()) -> str:
        text = show(self.value, names)
        return text if text == self.expression else f"{text} ({self.expression})"


@dataclasses.dataclass(frozen=True)
class Accepted:
    """What a rule accepts: ``min``, ``max`` or both, or one of the others."""

    min: Bound | None = None
    max: Bound | None = None
    multiple_of: Bound | None = None
    equals: Bound | None = None
    one_of: tuple[Value, ...] = ()
    unit: str = ""

    @property
    def is_flag(self) -> bool:
        """Whether the rule wants a yes, or a no: messages put that in words."""
        return len(self.one_of) == 1 and isinstance(self.one_of[0], bool)

    @property
    def values(self) -> tuple[Value, ...]:
        """All that it holds of sizes."""
        return tuple(each.value for each in (self.min, self.max, self.multiple_of, self.equals) if each is not None)

    def say(self, names: Names = ()) -> str:
        unit = f" {self.unit}" if self.unit else ""
        if self.one_of:
            several = "one of " if len(self.one_of) > 1 else ""
            return several + ", ".join(show_word(each, names) for each in self.one_of) + unit
        if self.multiple_of is not None:
            return f"a multiple of {self.multiple_of.say(names)}{unit}"
        if self.equals is not None:
            return f"{self.equals.say(names)}{unit}"
        if self.min is not None and self.max is not None:
            return f"{self.min.say(names)} to {self.max.say(names)}{unit}"
        if self.min is not None:
            return f"at least {self.min.say(names)}{unit}"
        assert self.max is not None
        return f"at most {self.max.say(names)}{unit}"

    def __str__(self) -> str:
        return self.say()

    def to_json(self, names: Names = ()) -> dict[str, Any]:
        """Each bound under its kind: numbers, or expressions as text."""
        kinds = ("min", "max", "multiple_of", "equals")
        fields: dict[str, Any] = {
            kind: to_json(bound.value, names) for kind in kinds if (bound := getattr(self, kind)) is not None
        }
        if self.one_of:
            fields["one_of"] = [to_json(each, names) for each in self.one_of]
        return {**fields, "unit": self.unit} if self.unit else fields


def pick_values(names: frozenset[str], quantities: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The quantities of some names, in the order of the names, as values."""
    return tuple((name, as_value(quantities[name])) for name in sorted(names))
