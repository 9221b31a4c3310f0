"""The columns that reports are wrapped to: 100, or what a command found its terminal to have (``use_width``)."""

from __future__ import annotations

import contextlib
import contextvars
import textwrap
from collections.abc import Iterator

WIDTH = 100
NARROWEST = 80  # tables are laid out for it

_width = contextvars.ContextVar("moe_lowering_report_width", default=WIDTH)


def report_width() -> int:
    """Columns of a report that is made now."""
    return _width.get()


def fold(text: str) -> str:
    """A paragraph on lines of that width, the later ones indented."""
    return "\n".join(textwrap.wrap(text, report_width(), subsequent_indent="  ", break_on_hyphens=False))


@contextlib.contextmanager
def use_width(columns: int) -> Iterator[None]:
    """Wrap reports that are made meanwhile to ``columns``, of 80 to 100: wider text is hard to read."""
    token = _width.set(min(max(columns, NARROWEST), WIDTH))
    try:
        yield
    finally:
        _width.reset(token)
