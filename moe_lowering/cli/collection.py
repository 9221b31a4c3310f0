"""Python's cyclic garbage collector in a command that imports much and then ends.

torch, transformers and a model of a thousand modules live as long as the process, yet each full collection looks at all of
their objects, while they are imported and once more at exit. That was a quarter of the CPU time of ``lower --fake``.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """For imports and what else stays: no collection meanwhile, and later ones do not look at what is there at the end."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


# Whether this process, which runs commands as functions, once put objects aside itself: what is aside is counted one by one, a
# tenth of a second for a million, so that it is not asked again, and a process that did so once keeps what commands import.
_process_freezes = False


@contextlib.contextmanager
def of_command() -> Iterator[None]:
    """Around a command. A process that goes on afterwards collects all that ``paused`` put aside, if it put nothing aside before;
    one that ends collects nothing, since the system takes the memory back."""
    global _process_freezes
    atexit.unregister(gc.freeze)  # or each of many commands would leave one
    atexit.register(gc.freeze)
    _process_freezes = _process_freezes or gc.get_freeze_count() > 0
    try:
        yield
    finally:
        if not _process_freezes:
            gc.unfreeze()
