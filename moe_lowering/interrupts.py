"""SIGINT and SIGTERM end what runs, while it compiles too.

torch_npu's torchair and npugraph_ex put handlers of their own in place when they are imported (torch_npu 2.13.0,
torchair/core/_backend.py and npugraph_ex/__init__.py, ``_signal_handler``). They call ``torch._dynamo.reset()``, which fails
while something is compiled ("Cannot clear callbacks while 1 are pending", as an error of whatever was running), and otherwise
leave the signal ignored: in both cases the process goes on. The handlers are for an engine that has to be finalised; both
modules do that with ``atexit`` too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds in which a second SIGTERM is taken for the first: timeout(1) sends it to the process, and then to its group.
SAME = 2.0

_OWNERS = ("torchair", "npugraph_ex", "torch_npu")
_module: Any = signal
_active = False  # whether ``interruptible`` is entered; the main thread's


class Terminated(SystemExit):
    """SIGTERM came. The process ends with exit code 143 unless somebody catches it."""

    def __init__(self) -> None:
        super().__init__(exit_code(signal.SIGTERM))


def exit_code(number: int) -> int:
    """What a shell shows for a process that a signal ended."""
    return 128 + number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, SIGINT raises ``KeyboardInterrupt``, and SIGTERM raises ``SystemExit(143)``, so that ``finally`` is run.

        with moe_lowering.interruptible():
            compiled(*inputs)

    Handlers of torch_npu are put back at the end, and those that it would install meanwhile, as it is imported, are
    installed then. Handlers of others, and signals that are ignored, stay as they are. Like every handler of Python's it
    runs when a call into C++ has returned. A second SIGTERM, more than ``SAME`` seconds after the first, ends the process
    without cleaning up. A SIGTERM that was caught meanwhile, or became another error, is raised at the end.

    In another thread than the main one it does nothing: Python runs all handlers in the main thread.
    """
    global _active
    if _active or threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = _Handlers()
    _active = True
    try:
        handlers.install()
        yield
        handlers.raise_what_was_swallowed()
    except Exception:
        handlers.raise_what_was_swallowed()
        raise
    finally:
        _active = False
        handlers.remove()


class _Handlers:
    """Handlers of both signals, and a guard before ``signal.signal``."""

    def __init__(self) -> None:
        self._terminated_at: float | None = None  # of the monotonic clock: when the first SIGTERM came
        self._later: dict[int, Any] = {}  # what is installed at the end
        self._signal = signal.signal

    def install(self) -> None:
        ours = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: self._terminate}
        for number, handler in ours.items():
            found = signal.getsignal(number)
            if found in (signal.SIG_DFL, signal.default_int_handler) or _of_torch_npu(found):
                self._later[number] = found
                self._signal(number, handler)
        _module.signal = self._guarded

    def remove(self) -> None:
        _module.signal = self._signal
        for number, handler in self._later.items():
            signal.signal(number, handler)

    def raise_what_was_swallowed(self) -> None:
        """Whoever made another error of ``Terminated``, or ignored it, as Python does in ``__del__``, did not mean to."""
        if self._terminated_at is not None:
            raise Terminated

    def _guarded(self, number: int, handler: Any) -> Any:
        """``signal.signal``, which keeps a handler of torch_npu's for later; another one stays, as without us."""
        if number not in SIGNALS or not _of_torch_npu(handler):
            before = self._signal(number, handler)
            self._later.pop(number, None)
            return before
        self._later[number] = handler
        return signal.getsignal(number)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._terminated_at is None:
            self._terminated_at = now
            raise Terminated
        if now - self._terminated_at > SAME:
            self._signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _of_torch_npu(handler: Any) -> bool:
    return str(getattr(handler, "__module__", "")).partition(".")[0] in _OWNERS
