"""The ``Deployment`` that the options of a command describe."""

from __future__ import annotations

from typing import Any

from moe_lowering.cli.assumed_machine import HCCL_BUFFER_MB, WEIGHT_FORMAT
from moe_lowering.cli.options import read_measured
from moe_lowering.deployment import Deployment


def make_deployment(request: Any, **others: Any) -> Deployment:
    """From a request of ``explain`` or ``lower``; ``others`` are fields that these two fill in their own ways."""
    return Deployment(
        soc=request.soc,
        ep_size=request.ep,
        tp_size=request.tp,
        max_tokens=request.max_tokens,
        equal_tokens=not request.unequal_tokens,
        hccl_buffer_mb=request.buffer_mb or HCCL_BUFFER_MB,
        weight_format=request.weight_format or WEIGHT_FORMAT,
        cann=request.cann or "",
        fused_mode=request.fused_mode,
        mc2_hierarchy=request.hierarchy,
        unpermute_operator=request.unpermute_operator,
        ranks_per_node=request.ranks_per_node,
        measured=read_measured(request.measured, request.soc),
        providers=request.providers,
        **others,
    )
