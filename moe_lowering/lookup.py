"""``look_up``: the value that a table has for a word. A word that the table lacks is a ValueError, never a default.
``did_you_mean``: the known words that a misspelled one resembles.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
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


def did_you_mean(word: str, known: Iterable[str], most: int = 1, cutoff: float = 0.6) -> str:
    """`` (did you mean ...?)``, or "" where no known word is like it."""
    close = difflib.get_close_matches(word, list(known), n=most, cutoff=cutoff)
    return f" (did you mean {', '.join(close)}?)" if close else ""
