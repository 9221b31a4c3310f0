"""Lines on stderr that say what a command is doing, for a person who waits; none where stderr is no terminal.

For the first two seconds nothing is printed. Then the latest message is, and from there on every message once, with the time;
so a command that is done within two seconds prints nothing.
"""

from __future__ import annotations

import contextlib
import sys
import textwrap
import threading
import time

from moe_lowering.cli.terminal import columns, is_terminal

QUIET = 2.0  # seconds


class Progress:
    """Call it with what is being done.

    Args:
        who: a rank, where there are several.
        shown: None to look at stderr.
    """

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
                self._say()
            elif self._timer is None:
                self._wait(left)

    def close(self) -> None:
        """Nothing is said any more: the command is done."""
        with self._lock:
            self._shown = False
            if self._timer is not None:
                self._timer.cancel()

    def _wait(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(seconds, self._wake)
        self._timer.daemon = True
        self._timer.start()

    def _wake(self) -> None:
        with self._lock:
            # a message that came while this waited for the lock has set another timer
            if self._shown and self._timer is threading.current_thread():
                self._say()

    def _say(self) -> None:
        start = f"[{self._who}{time.perf_counter() - self._started:6.1f} s] "
        room = max((columns(sys.stderr) or sys.maxsize) - len(start), 40)
        lines = textwrap.wrap(self._message, room, break_on_hyphens=False) or [""]
        with contextlib.suppress(OSError, ValueError):  # stderr may be closed
            print(start + ("\n" + " " * len(start)).join(lines), file=sys.stderr, flush=True)
