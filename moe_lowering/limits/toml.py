"""Parsing of TOML, which Python itself has from 3.11 on."""

import sys

if sys.version_info >= (3, 11):
    from tomllib import loads
else:  # pragma: no cover
    from tomli import loads

__all__ = ["loads"]
