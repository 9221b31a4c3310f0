"""What is said of a model that could not be lowered or run, in one line: whose error it is, where, and what can be done.

The error of a compiler is mostly not this package's, and its traceback of two hundred lines does not say so. ``--verbose``
prints it.
"""

from __future__ import annotations

import re
import sysconfig
import traceback
from pathlib import Path

from moe_lowering.cli.lower.request import LowerRequest
from moe_lowering.cli.usage import RunError, first_sentence
from moe_lowering.source_lines import innermost
from moe_lowering.testing.ranks import RankError

_OURS = Path(__file__).resolve().parents[2]  # moe_lowering
_NOBODYS = (_OURS / "cli", _OURS / "testing", _OURS / "interrupts.py")  # what starts and waits
_BACKEND = re.compile(r"^backend='\w+' raised: ")
_FILE = re.compile(r'File "([^"]+)", line \d+')
OWN, NPUGRAPH_EX, TORCH, MODEL = "moe_lowering", "torch_npu's npugraph_ex", "torch", "the model's own code"
# By the directory that a frame's file is in
_OWNERS = ((OWN, f"{_OURS}/"), (NPUGRAPH_EX, "/torch_npu/dynamo/npugraph_ex/"))
# A value that the graph takes to the host: npugraph_ex has a pair of values in place of a number then.
_FROM_DATA = re.compile(r"ValuePack|_local_scalar_dense|data-dependent|unbacked", re.IGNORECASE)


def run_error(error: Exception, request: LowerRequest) -> RunError:
    """The line for an error that is none of the command's arguments."""
    whose, text, name = owner_of(error), str(error), type(getattr(error, "inner_exception", error)).__name__
    said = _BACKEND.sub("", first_sentence(text))
    said = said if f"{name}: " in said else f"{name}: {said}"
    place = innermost(text) if "Original traceback" in text or "from user code" in text else None
    where = f", at {place}" if place else ""
    if whose == OWN:
        advice = "it is raised by this package: where the text does not help, report it with the traceback of --verbose"
        return RunError(f"{request.model} was not lowered and run: {said}{where}; {advice}", request.verbose)
    from_data = "; sizes that come from data cannot be compiled" if _FROM_DATA.search(text) else ""
    return RunError(
        f"{request.model} cannot be run, by an error of {whose}, not of the lowering: {said}{where}{from_data}; how far each "
        f"family goes is in docs/models.md, what is legal for its layers says moe-lowering explain {request.model}; --verbose "
        "prints the traceback",
        request.verbose,
    )


def owner_of(error: BaseException) -> str:
    """Whose code raised an error: that of the innermost frame that is not torch's. Where there is no other, it is torch."""
    inner: BaseException = getattr(error, "inner_exception", error)
    files = [frame.filename for frame in traceback.extract_tb(inner.__traceback__)]
    if isinstance(error, RankError):  # its own stack is that of waiting
        files = _FILE.findall(str(error))
    files = [file for file in files if not any(Path(file).is_relative_to(place) for place in _NOBODYS)]
    for file in reversed(files):
        if owner := next((owner for owner, folder in _OWNERS if folder in file), None):
            return owner
        if not _is_called(file):
            return MODEL
    return TORCH if any("/torch/" in file for file in files) else MODEL


def _is_called(file: str) -> bool:
    """Whether code works for who called it: torch is on the stack of every module, and raises for a model's arguments."""
    is_python = file.startswith(("<", sysconfig.get_path("stdlib"))) and "-packages/" not in file
    return is_python or "/torch/" in file or "/torch_npu/" in file
