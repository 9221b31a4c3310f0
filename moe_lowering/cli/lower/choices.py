"""The rows behind the picture on the page of ``lower --html``: which implementation is chosen, by tokens and EP size.

They come from the config of the model that the command lowers; no model is built.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_lowering.cli.deployments import make_deployment
from moe_lowering.cli.lower.configs import SMALL
from moe_lowering.cli.lower.models import plan_model
from moe_lowering.cli.lower.request import LowerRequest
from moe_lowering.explanation import BlockDescription, ExplainError, describe
from moe_lowering.explanation.answer import Question
from moe_lowering.explanation.table import Row, choices_around
from moe_lowering.model_configs.check import OWN_SIZES
from moe_lowering.passes.policy import Policy


def rows_of(request: LowerRequest) -> tuple[Row, ...]:
    """The rows; none for a model whose layers cannot be described by its config."""
    plan = plan_model(request)
    dtype = getattr(torch, request.dtype)
    try:
        if plan.config is None:
            small = {
                "hidden": SMALL.hidden,
                "intermediate": SMALL.intermediate,
                "experts": SMALL.experts,
                "top_k": SMALL.top_k,
            }
            sizes: dict[str, Any] = OWN_SIZES if request.fake else small
            block = BlockDescription(**sizes, dtype=dtype, quantisation=request.quant, layers=plan.layers)
        else:
            block = describe(plan.config, quantisation=request.quant, dtype=dtype)
    except ExplainError:
        return ()
    names = {"ep_group": "ep", "mc2_group": "mc2"} if request.ep > 1 else {"mc2_group": "mc2"}
    names |= {"tp_group": "tp"} if request.tp > 1 else {}
    deployment = make_deployment(request, **names).replace(
        max_tokens=0 if not request.unequal_tokens else request.max_tokens
    )
    return choices_around(Question(block, deployment, Policy(request.comm, request.policy)), request.tokens)
