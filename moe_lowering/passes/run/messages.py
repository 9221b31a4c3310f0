"""What one run of the pass says: warnings in the log, reasons for unexpected errors, the user's names of sizes.

Contract. ``name_symbols`` and ``log_warning`` do not raise: a message must not fail a compile. The others put an error into
words, by its own ``str``.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from moe_lowering.limits.wording import Names, Quoted, Wording, make_wording
from moe_lowering.passes.graph.symbol_names import dimension_names
from moe_lowering.passes.policy import PolicyError
from moe_lowering.passes.verifier import VerificationError

log = logging.getLogger(__name__)


def name_symbols(tokens: Any) -> Names:
    """The user's names of the symbols of T; none where T is a number, or where they cannot be had: the block is lowered all
    the same."""
    if isinstance(tokens, int):
        return ()
    try:
        return dimension_names(tokens)
    except Exception:
        log_warning("moe_lowering: no names could be given to the sizes in %s", tokens)
        return ()


def describe_internal_error(error: Exception) -> str:
    """What the report says of an error that nobody expected."""
    if isinstance(error, PolicyError):
        return str(error)
    return f"internal error, please report it: {type(error).__name__}: {error}"


def describe_undo(error: Exception) -> Wording:
    """What the report says of a rewrite that was taken back."""
    why = error.wording if isinstance(error, VerificationError) else Quoted(str(error))
    return make_wording("rewrite undone: {kind}: {why}", kind=type(error).__name__, why=why)


def log_warning(text: str, *args: Any, trace: bool = True, level: int = logging.WARNING) -> None:
    """Log; with the exception under way, unless ``trace`` is False."""
    with contextlib.suppress(Exception):  # whoever listens must not fail the compile
        log.log(level, text, *args, exc_info=trace)
