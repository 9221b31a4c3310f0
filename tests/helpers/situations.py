"""Graphs of three equal layers for each form of an implementation, in the situations that change what is emitted."""

from __future__ import annotations

from typing import Any

import torch
from graph_cases import BlockCase, GraphCase, RouteCase

from moe_lowering import Deployment
from moe_lowering.matrix.forms import FORMS

FIELDS = {"ep_size": 8, "ep_rank": 1, "ep_group": "ep", "mc2_group": "mc2", "installed": ()}
UNEQUAL = {"equal_tokens": False, "max_tokens": 48}
DYNAMIC = {"sizes": "dynamic", "bounds": (2, 64)}
# What is particular: of the deployment, of the blocks, of the graph.
SITUATIONS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "static": ({}, {}, {}),
    "symbolic": ({}, {}, DYNAMIC),
    "declared range": (UNEQUAL, {}, {}),
    "declared range, symbolic": (UNEQUAL, {}, DYNAMIC),
    "TP": ({"tp_size": 2, "tp_rank": 1, "tp_group": "tp"}, {}, {"lead": (5,)}),
    "TP, symbolic": ({"tp_size": 2, "tp_rank": 1, "tp_group": "tp"}, {}, DYNAMIC),
    "mask": ({}, {"mask": True}, {}),
    "GE": ({"mode": "ge"}, {}, {}),
    "lists": ({}, {"as_list": (True, True)}, {}),
    "counts": ({}, {"odd": ("counts_read",)}, {}),
    "late weights": ({}, {"odd": ("weights_late",)}, {}),
    "weights in 16 bits": ({}, {"odd": ("weights_in_16_bits",)}, {}),
    "rows of a rank are bounded": ({"max_rows": 8}, {}, {}),  # AllToAll by row
}


def case_of(name: str, quantisation: str, situation: str, *others: dict[str, Any]) -> tuple[GraphCase, str]:
    """Three equal blocks with routings, or one and others that differ; and the implementation that they are for."""
    form, (fields, block, graph) = FORMS[name], SITUATIONS[situation]
    deployment = Deployment(**{**FIELDS, **form.deployment_fields(form.layout(quantisation)), **fields})
    common: dict[str, Any] = {
        "experts": 64,
        "top_k": 4,
        "intermediate": 512,
        "quantisation": quantisation,
        "route": RouteCase(),
        "as_list": (form.lists,) * 2,
    }
    blocks = tuple(BlockCase(**{**common, **block, **other}) for other in ({}, *(others or ({}, {}))))
    return GraphCase(deployment, blocks, **{"lead": (4,), "hidden": 1024, "dtype": torch.bfloat16, **graph}), form.comm
