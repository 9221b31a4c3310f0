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


@contextlib.contextmanager
def of_command() -> Iterator[None]:
    """Around a command. A process that goes on afterwards collects all that ``paused`` put aside; one that ends collects
    nothing, since the system takes the memory back."""
    atexit.unregister(gc.freeze)  # or each of many commands would leave one
    atexit.register(gc.freeze)
    frozen = gc.get_freeze_count()  # by a process that runs commands as functions
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()
