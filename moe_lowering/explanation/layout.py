"""How the texts of ``explain`` are laid out: colours, labels in a left column, and lines of ``report_width``."""

from __future__ import annotations

from collections.abc import Sequence

from moe_lowering.report.width import wrap

LABEL = 18  # columns of the left column, as in report.text
_COLOURS = {"green": "\033[32m", "red": "\033[31m", "bold": "\033[1m", "dim": "\033[2m"}
_RESET = "\033[0m"


class Paint:
    """Colours words, or leaves them as they are. Applied after the layout: codes have no width."""

    def __init__(self, colour: bool) -> None:
        self.colour = colour

    def __call__(self, text: str, style: str) -> str:
        return f"{_COLOURS[style]}{text}{_RESET}" if self.colour and text else text

    def legal(self, text: str, legal: bool) -> str:
        return self(text, "green" if legal else "red")


def labelled_rows(label: str, texts: Sequence[str]) -> str:
    """Texts under each other beside one label."""
    return "\n".join(labelled_line(label if i == 0 else "", text) for i, text in enumerate(texts))


def labelled_line(label: str, text: str) -> str:
    """A label, and a text beside it that is wrapped under itself."""
    start = f"  {label:<{LABEL - 1}} "
    return "\n".join(wrap_text(text, start, " " * (len(start) + 2)))


def wrap_texts(start: str, texts: Sequence[str], rest: str) -> str:
    """Texts under each other, the first after ``start``."""
    lines: list[str] = []
    for text in texts:
        lines += wrap_text(text, rest if lines else start, rest + "  ")
    return "\n".join(lines)


def wrap_text(text: str, first: str, rest: str) -> list[str]:
    """A text on lines of ``report_width``; an empty one is the start of a line."""
    return wrap(text, first, rest) or [first]
