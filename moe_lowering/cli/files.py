"""Files that commands write: the path is checked before any work, and a file is written whole or not at all.

``add_html`` adds the option ``--html``. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from moe_lowering.cli.usage import UsageError
from moe_lowering.model_configs.errors import write_value

# Characters that an encoding has not, e.g. of a path that is no UTF-8, are written as Python escapes them.
UNENCODABLE = "backslashreplace"


def add_html(add: Any) -> None:
    """Add ``--html`` to a command."""
    add("--html", metavar="FILE", help="also write a page with pictures: one file, which needs no network")


def check_file(option: str, text: str) -> None:
    """Refuse a path at which no file can be written, by writing an empty one beside it.

    Raises:
        UsageError: it is empty, a folder, a device, a pipe, stdout or stderr, or its own folder is not there or takes no files.
    """
    path = Path(text)
    if not text or path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(f"argument --{option}: is {write_value(text)}; accepted: a file in a folder that exists")
    # /dev/null would be a file after the replacement
    if path.exists() and (not path.is_file() or _is_printed_to(path)):
        what = "what this command prints to" if _is_printed_to(path) else "no regular file"
        raise UsageError(f"argument --{option}: is {write_value(text)}, {what}; accepted: a file of its own")
    _write(option, path, "", keep=False)


def _is_printed_to(path: Path) -> bool:
    """Whether it is stdout or stderr."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # closed
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return True
    return False


def write_file(option: str, path: Path, text: str) -> None:
    """The whole file or what was there before, whenever the command is ended.

    Raises:
        UsageError: it cannot be written.
    """
    _write(option, path, text if text.endswith("\n") else text + "\n", keep=True)


def _write(option: str, path: Path, text: str, keep: bool) -> None:
    """To a file beside ``path``, which takes its place when it is to be kept, and else goes. A link stays one."""
    path = Path(os.path.realpath(path))
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, "utf-8", UNENCODABLE)
        if keep:
            beside.replace(path)
    except OSError as error:
        reason = f"is {write_value(str(path))}, which cannot be written ({error.strerror})"
        raise UsageError(f"argument --{option}: {reason}; accepted: a file in a folder that takes files") from error
    finally:
        with contextlib.suppress(OSError):  # where nothing can be written, nothing is left either
            beside.unlink(missing_ok=True)
