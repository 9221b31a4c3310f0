"""Wrapping of reports: to what a command sets (``use_width``), else to the terminal; to 100 columns where there is none."""

from __future__ import annotations

import contextlib
import contextvars
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator

WIDTH = 100
NARROWEST = 80  # tables are laid out for it

_width: contextvars.ContextVar[int | None] = contextvars.ContextVar("moe_lowering_report_width", default=None)


def report_width() -> int:
    """Columns of a report that is made now, of 80 to 100: ``print(report)`` wraps as the commands do."""
    used = _width.get()
    return _terminal_width() if used is None else used


def _terminal_width() -> int:
    try:
        if not sys.stdout.isatty():
            return WIDTH
    except (AttributeError, ValueError):  # None, or closed
        return WIDTH
    return _bounded(shutil.get_terminal_size((WIDTH, 0)).columns)


def _bounded(columns: int) -> int:
    return min(max(columns, NARROWEST), WIDTH)


def fold(text: str) -> str:
    """A paragraph on lines of that width, the later ones indented."""
    return "\n".join(wrap(text, "", "  "))


def wrap(text: str, first: str, rest: str) -> list[str]:
    """A text on lines of ``report_width``: the first after ``first``, the others after ``rest``. A path that is longer than a
    line is broken after a slash."""
    return _Wrapper(report_width(), initial_indent=first, subsequent_indent=rest, break_on_hyphens=False).wrap(text)


class _Wrapper(textwrap.TextWrapper):
    def _split(self, text: str) -> list[str]:
        room = self.width - len(self.subsequent_indent)
        return [
            part
            for word in super()._split(text)
            for part in (re.findall(r"[^/]*/|[^/]+", word) if len(word) > room else [word])
        ]


@contextlib.contextmanager
def use_width(columns: int) -> Iterator[None]:
    """Wrap reports that are made meanwhile to ``columns``, of 80 to 100: wider text is hard to read."""
    token = _width.set(_bounded(columns))
    try:
        yield
    finally:
        _width.reset(token)
