"""The error of a command that cannot be carried out as it was typed."""

from __future__ import annotations


class UsageError(Exception):
    """The command cannot be carried out as it was given: one line that names argument, value and what is accepted."""
