"""``ModelError``: a MODEL argument that is refused, and ``write_value``, the form in which its text repeats a value."""

from __future__ import annotations

from typing import Any

SHOWN, SHOWN_PATH = 80, 400  # characters of a value, and of a path, that an error repeats

# What is left for a type that transformers does not know: the pass takes any module, and the commands do not build it.
OF_NO_TYPE = "lower the model from Python (docs/examples.md)"


class ModelError(ValueError):
    """A MODEL that cannot be read: one line that names what is wrong and what is accepted."""


def write_value(value: Any) -> str:
    """A value as an error repeats it, cut where it is long."""
    is_path = isinstance(value, str) and "/" in value
    text, most = " ".join((value if is_path else repr(value)).split()), SHOWN_PATH if is_path else SHOWN
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"
