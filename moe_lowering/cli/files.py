"""Files that commands write: the path is checked before any work, and a file is written whole or not at all.

``add_html`` adds the option ``--html``. Imports no torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from moe_lowering.cli.usage import UsageError
from moe_lowering.model_configs.errors import write_value


def add_html(add: Any) -> None:
    """Add ``--html`` to a command."""
    add("--html", metavar="FILE", default="", help="also write a page with pictures: one file, which needs no network")


def check_file(option: str, path: Path) -> None:
    """Refuse a path that no file can have.

    Raises:
        UsageError: it is a folder, or in one that is not there.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(f"argument --{option}: is {write_value(str(path))}; accepted: a file in a folder that exists")


def write_file(option: str, path: Path, text: str) -> None:
    """The whole file or what was there before, whenever the command is ended.

    Raises:
        UsageError: it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise UsageError(f"argument --{option}: {path} cannot be written: {error.strerror}") from error
    finally:
        beside.unlink(missing_ok=True)
