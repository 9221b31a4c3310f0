"""Numbers of things in the words of a report."""

from __future__ import annotations

from typing import Any


def count_of(number: Any, what: str, several: str = "") -> str:
    """A number of things in words: ``1 layer``, ``2 layers``; ``several`` is the plural that an s alone does not make.

    What is not exactly one is several, an expression in a symbolic size too.
    """
    return f"{number} {what if str(number) == '1' else several or f'{what}s'}"
