"""Carries out a ``LowerRequest``, with ``fake`` or ``run``, after transformers is told not to download anything."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from moe_lowering.cli import collection
from moe_lowering.cli.lower.request import LowerRequest
from moe_lowering.cli.usage import UsageError
from moe_lowering.model_configs.errors import ModelError
from moe_lowering.model_configs.presets import PRESETS
from moe_lowering.number_words import count_of

if TYPE_CHECKING:
    from moe_lowering.cli.lower.outcome import LowerOutcome


def run_lower(request: LowerRequest, progress: Callable[[str], None]) -> LowerOutcome:
    """Carry out a command; transformers is imported after the environment says that it is offline."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a model is built from its config, never downloaded
    try:
        outcome = _run(request, progress)
    except (UsageError, ModelError):
        raise
    except Exception as error:  # of the model, torch, npugraph_ex or this package
        from moe_lowering.cli.lower.failures import run_error

        raise run_error(error, request) from error
    if request.html:
        from moe_lowering.cli.lower.choices import rows_of

        outcome.choices = rows_of(request)
    return outcome


def _run(request: LowerRequest, progress: Callable[[str], None]) -> LowerOutcome:
    if request.fake:
        with collection.paused():
            from moe_lowering.cli.lower.fake import lower_fake

        return lower_fake(request, progress)
    if request.model in PRESETS:
        ranks = count_of(request.ep, "process", "processes")
        note = f"moe-lowering: a small {request.model} on {ranks}; --fake lowers the published size"
        print(note, file=sys.stderr)
    with collection.paused():
        from moe_lowering.cli.lower.run import lower_and_compare

    return lower_and_compare(request, progress)
