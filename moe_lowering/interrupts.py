"""``interruptible``: within it SIGINT and SIGTERM end what runs, also while a graph is compiled, and ``finally`` is run.

SIGINT raises ``KeyboardInterrupt``, SIGTERM raises ``SystemExit(143)``. Only Python's own handlers and those of torch_npu are
replaced meanwhile; a user's handlers stay. Commands, the calls of a ``Server`` and conversions for GE run under it.

It is needed because torch_npu's torchair and npugraph_ex put handlers of their own in place when they are imported (torch_npu
2.13.0, torchair/core/_backend.py and npugraph_ex/__init__.py, ``_signal_handler``). They call ``torch._dynamo.reset()``, which
fails while something is compiled ("Cannot clear callbacks while 1 are pending", as an error of whatever was running), and
otherwise leave the signal ignored: in both cases the process goes on. The handlers are for an engine that has to be finalised;
both modules do that with ``atexit`` too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any

# Seconds in which a second signal is taken for the first: timeout(1) sends it to the process, and then to its group.
SAME = 2.0
AGAIN = 0.05  # seconds after which an interrupt that was swallowed is raised again

_OWNERS = ("torchair", "npugraph_ex", "torch_npu")
_module: Any = signal
_active: _Handlers | None = None  # those of ``interruptible``, while it is entered; the main thread's


class Interrupted(KeyboardInterrupt):
    """SIGINT came."""


class Terminated(SystemExit):
    """SIGTERM came. The process ends with exit code 143 unless somebody catches it."""

    def __init__(self) -> None:
        super().__init__(exit_code(signal.SIGTERM))


ERRORS: dict[int, type[Interrupted | Terminated]] = {signal.SIGINT: Interrupted, signal.SIGTERM: Terminated}


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
    runs when a call into C++ has returned.

    The error leaves the block: who catches it inside gets it again, also where another error was made of it. A second
    signal, more than ``SAME`` seconds after the first, ends the process without cleaning up.

    In another thread than the main one it does nothing: Python runs all handlers in the main thread.
    """
    global _active
    if _active is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = _Handlers()
    _active = handlers
    try:
        handlers.install()
        yield
        handlers.raise_what_was_swallowed()
    except Exception:
        handlers.raise_what_was_swallowed()
        raise
    finally:
        _active = None
        handlers.remove()


@contextlib.contextmanager
def blocked(*numbers: int) -> Iterator[None]:
    """Inside, these signals wait in this thread, and in what it starts for good; they come at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM wait; they come at the end. Blocked alone they would come by way of another thread."""
    handlers = _active if threading.current_thread() is threading.main_thread() else None
    if handlers is not None:
        handlers.is_postponed = True
    try:
        with blocked(*ERRORS):
            yield
    finally:
        if handlers is not None:
            handlers.is_postponed = False
            handlers.raise_what_waited()


class _Handlers:
    """Handlers of both signals, and a guard before ``signal.signal``."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None  # the signal, and when it came, of the monotonic clock
        self._repeated = False  # whether the next signal is our own
        self.is_postponed = self._waits = False  # whether errors wait, and whether one does
        self._watched: weakref.ref[BaseException] | None = None
        self._later: dict[int, Any] = {}  # what is installed at the end
        self._signal = signal.signal
        self._unraisable = sys.unraisablehook

    def install(self) -> None:
        for number in ERRORS:
            handler = signal.getsignal(number)
            if handler in (signal.SIG_DFL, signal.default_int_handler) or _of_torch_npu(handler):
                self._later[number] = handler
                self._signal(number, self._interrupt)
        _module.signal = self._guarded
        sys.unraisablehook = self._ignored

    def remove(self) -> None:
        _module.signal = self._signal
        sys.unraisablehook = self._unraisable
        for number, handler in self._later.items():
            signal.signal(number, handler)

    def raise_what_was_swallowed(self) -> None:
        if self._first is not None:
            raise ERRORS[self._first[0]]

    def _guarded(self, number: int, handler: Any) -> Any:
        """``signal.signal``, which keeps a handler of torch_npu's for later; another one stays, as without us."""
        if number not in ERRORS or not _of_torch_npu(handler):
            before = self._signal(number, handler)
            self._later.pop(number, None)
            return before
        self._later[number] = handler
        return signal.getsignal(number)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        repeated, self._repeated = self._repeated, False
        if self._first is None:
            self._first = (number, now)
        elif not repeated:
            if now - self._first[1] > SAME:
                self._signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self._waits = self.is_postponed
        if not self._waits:
            raise self._error(self._first[0])

    def raise_what_waited(self) -> None:
        if self._waits and self._first is not None:
            self._waits = False
            raise self._error(self._first[0])

    def _error(self, number: int) -> BaseException:
        """An error that is raised again when nothing refers to it any more; not while it propagates, nor within
        ``finally``.

        It is lost where C code clears it (torch does, when it imports numpy) and where Python ignores it (``__del__``).
        """
        error = ERRORS[number]()
        self._watched = weakref.ref(error, self._swallowed)
        return error

    def _ignored(self, unraisable: sys.UnraisableHookArgs) -> None:
        """``sys.unraisablehook``: silent about our own error, which comes again, within ``__del__`` or a weak reference's
        callback."""
        if not isinstance(unraisable.exc_value, (Interrupted, Terminated)):
            self._unraisable(unraisable)

    def _swallowed(self, reference: object) -> None:
        if _active is self:
            # Raised here, whatever swallowed the first would swallow this one too
            timer = threading.Timer(AGAIN, self._repeat)
            timer.daemon = True
            timer.start()

    def _repeat(self) -> None:
        thread = threading.main_thread().ident
        if _active is self and self._first is not None and thread is not None:
            self._repeated = True
            signal.pthread_kill(thread, self._first[0])


def _of_torch_npu(handler: Any) -> bool:
    return str(getattr(handler, "__module__", "")).partition(".")[0] in _OWNERS
