"""``loads`` of a TOML parser: Python's own, or ``tomli`` on Python 3.10, which has none."""

import sys

if sys.version_info >= (3, 11):
    from tomllib import loads
else:  # pragma: no cover
    from tomli import loads

__all__ = ["loads"]
