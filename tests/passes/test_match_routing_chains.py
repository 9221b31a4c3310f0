"""Chains of one rank (``npu_moe_init_routing_v2``) are found, and what differs from one in one thing is not: by its code.

What they compute is compared in test_raise_npu_alone; chains of MC2 are in test_match_npu_chains.
"""

from __future__ import annotations

from typing import Any

import npu_chain_layers as chains
import pytest
import torch
from test_match_npu_chains import ROUTED, alone, anchor, graph_of, routed_layer

from moe_lowering.passes.raise_foreign.match_routing_chain import ROUTE, match_routing
from moe_lowering.passes.raise_foreign.records import NotThisForm


@pytest.mark.parametrize("case", [*ROUTED, "unpermute, dynamic", "finalize, dynamic"])
def test_a_routing_chain_is_found(case):
    dynamic = case.endswith("dynamic")
    case = case.removesuffix(", dynamic")
    with alone() as deployment:
        every_row = {"route": {"active_num": -1}} if dynamic else {}
        layer = routed_layer(**ROUTED[case], **every_row)
        chain = match_routing(anchor(graph_of(layer, deployment, dynamic=dynamic), ROUTE), deployment)
    given = chain.experts.given
    assert (given["quantisation"], given["activation"]) == (layer.quantisation, layer.activation)
    assert (chain.added != ()) == layer.shared
    assert (chain.counts is not None) == (layer.kind == 1)
    assert chain.sent["num_experts"] == chains.EXPERTS


ROUTED_TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu between the matmuls": ("raise.activation", {"between": torch.relu}),
    "results weighted twice": ("raise.operation_between", {"out": lambda out: out * 2}),
    "another index at the way back": ("raise.index", {"index": lambda index: index.flip(0)}),
    "the index is changed": ("raise.index", {"index": lambda index: index + 0 * index}),
    "rows returned": ("raise.single_use", {"returned": lambda rows, scale, counts, out: rows}),
    "counts shifted by one": ("raise.counts", {"second_groups": lambda counts: counts.roll(1)}),
    "prefix sums shifted by one": ("raise.counts", {"kind": 0, "second_groups": lambda sums: sums.roll(1)}),
    "rows in MX": ("raise.format", {"route": {"quant_mode": 3}}),
    "counts for prefix sums": ("raise.counts", {"route": {"expert_tokens_num_type": 0}}),
    "prefix sums, W8A8": ("raise.counts", {"quantisation": "w8a8", "kind": 0}),
    "some of the experts": ("raise.partial_range", {"route": {"active_expert_range": [0, chains.EXPERTS - 1]}}),
    "some of the rows": ("raise.rows", {"route": {"active_num": 11}}),
    "rows that are dropped": ("raise.literal", {"route": {"drop_pad_mode": 1, "expert_capacity": 4}}),
    "the inverse index": ("raise.literal", {"route": {"row_idx_type": 1}}),
    "another k": ("raise.weights", {"weights": lambda weights: weights[:, :1]}),
    "by column": ("raise.literal", {"back": "finalize", "finalize": lambda given: [*given[:7], 0]}),
    "a skip of half the columns": (
        "raise.dtype", {"back": "finalize", "finalize": lambda g: [g[0], g[1], g[1][:, :512], *g[3:]], "shared": True}
    ),
    "a skip in float32": (
        "raise.dtype", {"back": "finalize", "finalize": lambda g: [g[0], g[1].float(), *g[2:]], "shared": True}
    ),
}  # fmt: skip


@pytest.mark.parametrize("twin", ROUTED_TWINS)
def test_a_twin_of_a_routing_chain_is_left(twin):
    code, changes = ROUTED_TWINS[twin]
    with alone() as deployment:
        if "route" in changes:  # what the matmuls are told stays
            changes = {**changes, "kind": 1}
        layer = routed_layer(**changes)
        node = anchor(graph_of(layer, deployment), ROUTE)
        with pytest.raises(NotThisForm) as left:
            match_routing(node, deployment)
    assert left.value.record.code == code, left.value
