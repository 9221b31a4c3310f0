"""Checks that all public functions share: of instances, flags, numbers, words, callables and time-outs.

``refuse`` makes the ValueError, which names the argument, its value and what is accepted; each ``require_...`` raises it or
returns nothing. Checks that know what a model or a deployment is are in ``model_arguments`` and ``deployment_checks``.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any


def refuse(where: str, name: str, value: Any, accepted: str) -> ValueError:
    """The error for an argument that is not accepted; long values are cut."""
    shown = repr(value)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
    return ValueError(f"{where}: {name} is {shown}; accepted: {accepted}")


def require_instance(where: str, name: str, value: Any, kind: type | tuple[type, ...], accepted: str) -> None:
    """``value`` is an instance of ``kind``."""
    if not isinstance(value, kind):
        raise refuse(where, name, value, accepted)


def require_flag(where: str, name: str, value: Any) -> None:
    """``value`` is a bool: a word such as "no" would count as True."""
    require_instance(where, name, value, bool, "True or False")


def require_callable(where: str, name: str, value: Any, accepted: str) -> None:
    """``value`` can be called."""
    if not callable(value):
        raise refuse(where, name, value, accepted)


def require_integer(where: str, name: str, value: Any, low: int, high: int | None = None) -> None:
    """``value`` is an int from ``low`` to ``high``, and no bool."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        raise refuse(where, name, value, f"an int, {low} or more" if high is None else f"an int from {low} to {high}")


def require_number(where: str, name: str, value: Any) -> None:
    """``value`` is a finite number, or None for the default."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if value is not None and not number:
        raise refuse(where, name, value, "a finite number, or None")


def require_choice(where: str, name: str, value: Any, choices: Collection[str]) -> None:
    """``value`` is one of some words."""
    if not isinstance(value, str) or value not in choices:
        raise refuse(where, name, value, ", ".join(choices))


def require_seconds(where: str, name: str, value: Any, *words: str | None) -> None:
    """``value`` is a finite number of seconds above 0, or one of ``words``."""
    if any(value is word or (isinstance(word, str) and value == word) for word in words):
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        others = "".join(f", or {word!r}" for word in words)
        raise refuse(where, name, value, f"seconds, a finite number above 0{others}")
