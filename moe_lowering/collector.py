"""``collector_paused``: no garbage collection while much is made that is kept.

With torch and torch_npu loaded a full collection takes 190 ms, and imports or a pass over a large graph would start several.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the garbage collector; it is as it was afterwards."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
