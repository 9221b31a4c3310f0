"""Errors of commands that are one line: ``UsageError`` of how it was typed, ``RunError`` of what it ran."""

from __future__ import annotations


class UsageError(Exception):
    """A command that cannot be carried out as it was typed: one line that names argument, value and what is accepted. The exit
    code is 2."""


class RunError(Exception):
    """What a command ran failed: one line that says whose error it is. The exit code is 1; its cause has the traceback, which is
    printed when the command is ``verbose``."""

    def __init__(self, text: str, verbose: bool) -> None:
        super().__init__(text)
        self.verbose = verbose


def first_sentence(text: str) -> str:
    """The first line of an error, and the one that it announces: torch writes the cause of a failed compile below a colon."""
    lines = text.strip().splitlines() or [""]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])
