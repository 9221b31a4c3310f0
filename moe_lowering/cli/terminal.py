"""What the terminal can show: its width, and whether text may be coloured. Imports no torch.

NO_COLOR and FORCE_COLOR are read as no-color.org and force-color.org say: they count when they are set and not empty. A
terminal with TERM=dumb gets no colours.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO


def width() -> int:
    """Columns of a report: COLUMNS where it is set, else those of the terminal. Of a stdout that is none, such as a pipe to
    ``less``, that of stderr, on which a pager most likely shows it; ``report.width.WIDTH`` where there is no terminal."""
    from moe_lowering.report.width import WIDTH  # with it torch, which a wrong command is not to wait for

    return columns(sys.stdout) or columns(sys.stderr) or WIDTH


def columns(stream: TextIO | None) -> int:
    """Columns for what is printed to a stream: COLUMNS where it is set, else those of the terminal; 0 where it is none."""
    given = os.environ.get("COLUMNS", "")
    if given.isascii() and given.isdecimal() and 0 < len(given) < 6 and int(given) > 0:
        return int(given)
    try:
        return os.get_terminal_size(stream.fileno()).columns if stream is not None else 0
    except (AttributeError, ValueError, OSError):  # closed, no file, no terminal
        return 0


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is open, and a terminal."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def use_colour(choice: str) -> bool:
    """Whether to colour stdout: ``always``, ``never``, or ``auto``, where the environment and the terminal decide."""
    if choice != "auto":
        return choice == "always"
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return is_terminal(sys.stdout) and os.environ.get("TERM") != "dumb"
