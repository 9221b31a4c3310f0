"""Numbers of things, and sizes in bytes, in the words of a report."""

from __future__ import annotations

import sys
from typing import Any

# Said once by each report that has sizes. Sizes are decimal as the prices' rates and machines' memories are published.
UNITS = "MB and GB are 10**6 and 10**9 bytes; of HCCL_BUFFSIZE a MB is 2**20 bytes, as CANN counts it"
WORST = sys.float_info.max  # of an error: NaN and infinity, which JSON lacks


def count_of(number: Any, what: str, several: str = "") -> str:
    """A number of things in words: ``1 layer``, ``2 layers``; ``several`` is the plural that an s alone does not make.

    What is not exactly one is several, an expression in a symbolic size too.
    """
    return f"{number} {what if str(number) == '1' else several or f'{what}s'}"


def megabytes(size: float) -> str:
    """Bytes as ``1,234.5 MB``."""
    return f"{size / 1e6:,.1f} MB"


def gigabytes(size: float) -> str:
    """Bytes as ``68.7 GB``; what would be 0.0 and is something, as ``less than 0.1 GB``."""
    return "less than 0.1 GB" if 0 < size < 0.05e9 else f"{size / 1e9:,.1f} GB"
