"""The experts of a torch_npu chain: grouped matmul, activation, grouped matmul, as the call of the generic ``grouped_mlp``.

    none   matmul > activation > matmul, with biases or without
    w4a16  matmul (antiquant scale and offset) > activation > matmul
    gate and up may be two matmuls of the same rows, whose results the activation takes, or which are put side by side
    rows   may become int8 by npu_dynamic_quant after they were routed; of int8 rows see ``match_int8_experts``

Activations: ``match_npu_activation``. Groups: ``group_lists``. Rows past the sum of the counts are undefined before and after, in
the chain and in what replaces it.
Sources: ops_transformer.grouped_matmul; recipes.fused_mlp: the chains that are written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from moe_lowering.passes.graph.arguments import argument
from moe_lowering.passes.raise_foreign.chain_walk import Walk, is_operator, tensors, value_of
from moe_lowering.passes.raise_foreign.group_lists import Groups
from moe_lowering.passes.raise_foreign.match_int8_experts import match_int8
from moe_lowering.passes.raise_foreign.match_npu_activation import match_npu_gate
from moe_lowering.passes.raise_foreign.npu_matmuls import (
    QUANTISE,
    SCALES,
    Experts,
    first_matmuls,
    make_experts,
    of_firsts,
    quantised_rows,
    require_none,
    require_own_dtype,
    require_weight_dtype,
    second_matmul,
    side_by_side,
)
from moe_lowering.passes.raise_foreign.records import NotThisForm


def match_npu_experts(
    walk: Walk, rows: Node | None, row_scale: Node | None, counts: Node | None, kind: int, anchor: Node
) -> Experts:
    """Of rows [N, H] (int8 with ``row_scale``) in groups of ``counts``, which are of group_list_type ``kind``.

    Raises:
        NotThisForm: what follows the rows is no such chain.
    """
    if rows is None or counts is None:
        raise NotThisForm(
            anchor, "raise.unused", f"rows or counts of {anchor.name} are not read", "a value that the form reads"
        )
    dtype = value_of(rows).dtype
    if row_scale is None and all(is_operator(reader, QUANTISE) for reader, _ in walk.ways(rows, "rows")):
        rows, row_scale = quantised_rows(walk, rows, "rows")
        dtype = value_of(rows).dtype
    groups = Groups(counts, kind)
    if dtype == torch.int8:
        if row_scale is None:
            raise NotThisForm(
                anchor,
                "raise.unused",
                f"scales of the int8 rows of {anchor.name} are not read",
                "a value that the form reads",
            )
        experts = match_int8(walk, rows, row_scale, groups)
    else:
        firsts = first_matmuls(walk, rows, groups)
        match = _int4 if argument(firsts[0], "antiquant_scale") else _plain
        experts = match(walk, firsts, groups, dtype)
    groups.add_to(walk)
    return experts


def _plain(walk: Walk, firsts: tuple[Node, ...], groups: Groups, dtype: torch.dtype) -> Experts:
    fields: dict[str, Any] = {"quantisation": "none"}
    firsts, words, last = _between(walk, firsts, groups)
    for node in (*firsts, last):
        require_own_dtype(node, dtype)
        require_none(node, *SCALES)
    fields |= {"w13_bias": of_firsts(firsts, "bias"), "w2_bias": tensors(last, "bias")}
    return make_experts(walk, firsts, last, {**fields, **words})


def _int4(walk: Walk, firsts: tuple[Node, ...], groups: Groups, dtype: torch.dtype) -> Experts:
    fields: dict[str, Any] = {"quantisation": "w4a16", "w13_bias": [], "w2_bias": []}
    firsts, words, last = _between(walk, firsts, groups)
    for node in (*firsts, last):
        require_own_dtype(node, dtype)
        require_none(node, "scale", "per_token_scale", "bias")
        if not tensors(node, "antiquant_scale"):
            raise NotThisForm(node, "raise.weights", f"{node.name}: antiquant_scale is None", "as the other matmul")
        require_weight_dtype(node, torch.int32)
    for nodes, name in ((firsts, "w13"), ((last,), "w2")):
        fields[f"{name}_scale"], fields[f"{name}_offset"] = (
            of_firsts(nodes, f"antiquant_{each}") for each in ("scale", "offset")
        )
    return make_experts(walk, firsts, last, {**fields, **words})


def _between(walk: Walk, firsts: tuple[Node, ...], groups: Groups) -> tuple[tuple[Node, ...], dict[str, Any], Node]:
    """(the first matmuls in the order of their columns, the words of the activation, the second matmul)."""
    firsts, hidden = side_by_side(walk, firsts)
    activation = match_npu_gate(walk, hidden)
    return activation.ordered(firsts, hidden), activation.words, second_matmul(walk, activation.result, groups)
