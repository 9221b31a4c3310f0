"""Carries out a ``LowerRequest``, with ``fake`` or ``run``, after transformers is told not to download anything."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from moe_lowering.cli.lower.request import LowerRequest
from moe_lowering.collector import collector_paused

if TYPE_CHECKING:
    from moe_lowering.cli.lower.outcome import LowerOutcome


def run_lower(request: LowerRequest, progress: Callable[[str], None]) -> LowerOutcome:
    """Carry out a command; transformers is imported after the environment says that it is offline."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a model is built from its config, never downloaded
    outcome = _run(request, progress)
    if request.html:
        from moe_lowering.cli.lower.choices import rows_of

        outcome.choices = rows_of(request)
    return outcome


def _run(request: LowerRequest, progress: Callable[[str], None]) -> LowerOutcome:
    with collector_paused():  # torch and the like: nothing of what an import makes is to be collected
        if request.fake:
            from moe_lowering.cli.lower.fake import lower_fake as carry_out
        else:
            from moe_lowering.cli.lower.run import lower_and_compare as carry_out
    return carry_out(request, progress)
