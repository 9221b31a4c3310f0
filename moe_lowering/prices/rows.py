"""A user's measured rows: what took how long. Without torch.

    soc,what,ranks,amount,us
    A3,dispatch,16,7864320,139.0

``what`` is a word of ``WORDS``. ``amount``: of exchanges (``exchange``, ``dispatch``, ``combine``) the bytes of payload of one
rank, those for itself among them; of matmuls operations (2 * rows * K * N); of ``memory`` bytes read and written; of ``vector``
0. ``ranks`` is 1 but for exchanges. A column ``ranks_per_node`` may say how many ranks a node has; 0 is the SoC's server.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_lowering.vocabulary import SOCS

# Kinds of work: starting a small kernel, bytes of memory, operations of matmuls by the dtype of their rows, collectives, and
# MC2's two operators. Each has a law (``laws``).
WORDS = ("vector", "memory", "matmul_16bit", "matmul_int8", "matmul_float32", "exchange", "dispatch", "combine")
REQUIRED = ("soc", "what", "ranks", "amount", "us")
OPTIONAL = ("ranks_per_node",)
EXCHANGES = ("exchange", "dispatch", "combine")
MOST, MOST_RANKS = 2**62, 2**20


class Row(NamedTuple):
    """One measurement; see the module. ``ranks_per_node`` is 0 for the SoC's server."""

    soc: str
    what: str
    ranks: int
    amount: int
    us: float
    ranks_per_node: int = 0


def digest_of(rows: Sequence[Row]) -> str:
    """What ranks compare and caches hash of the rows; "" without any."""
    return hashlib.sha256(repr([tuple(row) for row in rows]).encode()).hexdigest()[:16] if rows else ""


class MeasuredError(ValueError):
    """A file of measured rows that is wrong. The message names it, the line, the column, the value and what is accepted."""


def require_rows(name: str, value: Any, soc: str) -> tuple[Row, ...]:
    """A user's rows, read where a path is given; "" is none.

    Raises:
        MeasuredError: a ValueError: the file or the value is wrong, or no row is of the SoC.
    """
    rows = (
        read_csv(value, name) if isinstance(value, os.PathLike) or (isinstance(value, str) and value) else value or ()
    )
    if not isinstance(rows, tuple) or not all(isinstance(row, Row) for row in rows):
        raise MeasuredError(f"{name} is {value!r}; accepted: a path to a CSV file, or its rows")
    if rows and all(row.soc != soc for row in rows):
        socs = ", ".join(dict.fromkeys(row.soc for row in rows))
        raise MeasuredError(f"{name} has rows of {socs}; accepted: rows of {soc}, which is soc, among them")
    return rows


def read_csv(path: str | os.PathLike[str], name: str = "measured") -> tuple[Row, ...]:
    """A user's rows, in the order of the file.

    Args:
        name: the argument that the path was given as, for messages.

    Raises:
        MeasuredError: a ValueError, see there.
    """
    where = f"{name} {os.fspath(path)!r}"
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null byte in the path
        reason = getattr(error, "strerror", None) or error
        raise MeasuredError(f"{where} cannot be read ({reason}); accepted: a CSV file in UTF-8") from error
    return tuple(_rows(text, where))


def _rows(text: str, where: str) -> list[Row]:
    reader = csv.reader(io.StringIO(text.removeprefix("\ufeff")), strict=True)
    columns: list[str] | None = None
    parsed = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            at = f"{where}, line {reader.line_num}"
            if columns is None:
                columns = _columns([cell.strip() for cell in cells], at)
                continue
            if len(cells) != len(columns):
                raise MeasuredError(f"{at}: has {len(cells)} columns; accepted: {len(columns)} ({', '.join(columns)})")
            parsed.append(_row(dict(zip(columns, (cell.strip() for cell in cells), strict=True)), at))
    except csv.Error as error:
        raise MeasuredError(f"{where}, line {reader.line_num}: {error}; accepted: CSV") from error
    if not parsed:
        raise MeasuredError(f"{where} has no rows; accepted: a line with {', '.join(REQUIRED)}, and at least one row")
    return parsed


def _columns(header: list[str], at: str) -> list[str]:
    accepted = f"{', '.join(REQUIRED)}, and if wanted {', '.join(OPTIONAL)}, each once"
    for name in header:
        if name not in (*REQUIRED, *OPTIONAL) or header.count(name) > 1:
            raise MeasuredError(f"{at}: column {name!r} is unknown or there twice; accepted: {accepted}")
    if missing := [name for name in REQUIRED if name not in header]:
        raise MeasuredError(f"{at}: column {missing[0]!r} is missing; accepted: {accepted}")
    return header


def _row(cells: dict[str, str], at: str) -> Row:
    def read(name: str, accepted: str, parse: Callable[[str], Any]) -> Any:
        try:
            return parse(cells[name])
        except ValueError:
            raise MeasuredError(f"{at}, column {name}: is {cells[name]!r}; accepted: {accepted}") from None

    what = read("what", ", ".join(WORDS), lambda text: _word(text, WORDS))
    exchanges, starts = what in EXCHANGES, what == "vector"
    low, high = (2, MOST_RANKS) if exchanges else (1, 1)
    ranks = read("ranks", "an integer of 2 or more" if exchanges else "1", lambda text: _whole(text, low, high))
    least, most = (0, 0) if starts else (ranks if exchanges else 1, MOST)
    accepted = "0" if starts else f"an integer of {least} or more"
    return Row(
        soc=read("soc", ", ".join(SOCS), lambda text: _word(text, tuple(SOCS))),
        what=what,
        ranks=ranks,
        amount=read("amount", accepted, lambda text: _whole(text, least, most)),
        us=read("us", "a number above 0, microseconds", _positive),
        ranks_per_node=read("ranks_per_node", "an integer of 0 or more", lambda text: _whole(text, 0, MOST_RANKS))
        if "ranks_per_node" in cells
        else 0,
    )


def _word(text: str, words: tuple[str, ...]) -> str:
    if text not in words:
        raise ValueError
    return text


def _whole(text: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 20 and low <= int(text) <= high):
        raise ValueError
    return int(text)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e12:  # nan is neither
        raise ValueError
    return value
