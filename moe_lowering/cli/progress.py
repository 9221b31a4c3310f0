"""Lines on stderr that say what a command is doing, for a person who waits; none where stderr is no terminal.

For the first two seconds nothing is printed. Then the latest message is, and from there on every message; so a command
that is done within two seconds prints nothing.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time

from moe_lowering.cli.terminal import is_terminal

QUIET = 2.0  # seconds


class Progress:
    """Call it with what is being done. ``who``: a rank, where there are several; ``shown``: None to look at stderr."""

    def __init__(self, who: str = "", shown: bool | None = None) -> None:
        self._shown = is_terminal(sys.stderr) if shown is None else shown
        self._who = f"{who} " if who else ""
        self._started = time.perf_counter()
        self._lock = threading.Lock()
        self._message = ""
        self._timer: threading.Timer | None = None

    def __call__(self, message: str) -> None:
        if not self._shown:
            return
        with self._lock:
            self._message = message
            left = QUIET - (time.perf_counter() - self._started)
            if left <= 0:
                self._print()
            elif self._timer is None:
                self._timer = threading.Timer(left, self._say)
                self._timer.daemon = True
                self._timer.start()

    def close(self) -> None:
        """Nothing is said any more: the command is done."""
        with self._lock:
            self._shown = False
            if self._timer is not None:
                self._timer.cancel()

    def _say(self) -> None:
        with self._lock:
            if self._shown:
                self._print()

    def _print(self) -> None:
        seconds = time.perf_counter() - self._started
        with contextlib.suppress(OSError, ValueError):  # stderr may be closed
            print(f"[{self._who}{seconds:6.1f} s] {self._message}", file=sys.stderr, flush=True)
