"""``UsageError``: a command that cannot be carried out as it was typed. Its text is printed, and the exit code is 2."""

from __future__ import annotations


class UsageError(Exception):
    """A command that cannot be carried out as it was typed: one line that names argument, value and what is accepted."""
