"""One name for the paths of equal layers: ``model.layers.{3-60}.mlp.experts`` in place of 58 paths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"(\d+)")


def names(block_names: Sequence[str]) -> str:
    """Names that differ in one number as one name, e.g. ``model.layers.{3-60}.mlp.experts``; else joined by commas."""
    pieces = [_NUMBER.split(name) for name in block_names]
    first = pieces[0]
    if len(block_names) == 1 or any(len(p) != len(first) for p in pieces):
        return ", ".join(block_names)
    varying = [i for i in range(len(first)) if any(p[i] != first[i] for p in pieces)]
    if len(varying) != 1 or not all(p[varying[0]].isdigit() for p in pieces):
        return ", ".join(block_names)
    at = varying[0]
    return "".join([*first[:at], "{" + _ranges(int(p[at]) for p in pieces) + "}", *first[at + 1 :]])


def _ranges(numbers: Iterable[int]) -> str:
    """``0,2-5`` for 0, 2, 3, 4, 5."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
