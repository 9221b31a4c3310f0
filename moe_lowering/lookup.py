"""``look_up``: the value that a table has for a word. A word that the table lacks is a ValueError, never a default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Word = TypeVar("Word")
Meaning = TypeVar("Meaning")


def look_up(table: Mapping[Word, Meaning], word: Word, what: str) -> Meaning:
    """What a word means.

    Args:
        what: what the word is said of, for the error: ``route: scoring``.

    Raises:
        ValueError: the table does not have the word; the message names it, and those that are accepted.
    """
    if word not in table:
        raise ValueError(f"{what} is {word!r}; accepted: {', '.join(map(str, table))}")
    return table[word]
