"""``SourceLine``, a line of the user's model, and the innermost one of a stack trace that dynamo recorded for a node.

Reports and errors name it. The line that is running, which has no recorded trace, is found in
``simulator/device/source_location``.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sysconfig
from pathlib import Path

_SITE = Path(sysconfig.get_paths()["purelib"])
_OURS = Path(__file__).resolve().parent  # moe_lowering
OUTSIDE = tuple(f"{folder}/" for folder in (_SITE / "torch", _SITE / "torch_npu", _OURS))
_TRACE_LINE = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)\n\s*(?P<text>[^\n]*)')


@dataclasses.dataclass(frozen=True)
class SourceLine:
    """A line of the user's code. ``text`` is its source, "" when that is not known."""

    file: str
    line: int
    function: str
    text: str = ""

    def __str__(self) -> str:
        # A library's file by its place in the library, this package's too: shorter, and the same in every environment
        place = self.file.removeprefix(f"{_OURS.parent}/" if self.file.startswith(f"{_OURS}/") else f"{_SITE}/")
        where = f"{place}:{self.line} in {self.function}"
        return f"{where}: {self.text}" if self.text else where


@functools.lru_cache(maxsize=64)
def innermost(trace: str) -> SourceLine | None:
    """The innermost line of user code in a stack trace that dynamo recorded; of any code where there is no user code.

    Equal layers have equal traces, which are dozens of lines.
    """
    places = [
        SourceLine(m["file"], int(m["line"]), m["function"], m["text"].strip()) for m in _TRACE_LINE.finditer(trace)
    ]
    users = [place for place in places if not place.file.startswith(OUTSIDE)]
    chosen = users or places
    return chosen[-1] if chosen else None
