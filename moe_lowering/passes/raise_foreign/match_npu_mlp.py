"""The experts of a torch_npu chain: grouped matmul, activation, grouped matmul, as the call of the generic ``grouped_mlp``.

    none   matmul > activation > matmul, with biases or without
    w4a16  matmul (antiquant scale and offset) > activation > matmul
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
from moe_lowering.passes.raise_foreign.match_npu_activation import match_activation
from moe_lowering.passes.raise_foreign.npu_matmuls import (
    QUANTISE,
    SCALES,
    Experts,
    check_matmul,
    experts_of,
    quantised_rows,
    require_none,
    require_own_dtype,
    require_weight_dtype,
    result_of,
    second_matmul,
)
from moe_lowering.passes.raise_foreign.records import NotThisForm


def match_experts(
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
    reader, path = walk.onward(rows, "rows")
    if row_scale is None and is_operator(reader, QUANTISE):
        rows, row_scale = quantised_rows(walk, rows, "rows")
        dtype = value_of(rows).dtype
        reader, path = walk.onward(rows, "rows")
    groups = Groups(counts, kind)
    if dtype == torch.int8:
        if row_scale is None:
            raise NotThisForm(
                anchor,
                "raise.unused",
                f"scales of the int8 rows of {anchor.name} are not read",
                "a value that the form reads",
            )
        experts = match_int8(walk, reader, path, row_scale, groups)
    else:
        first = check_matmul(walk, reader, path, groups)
        match = _int4 if argument(first, "antiquant_scale") else _plain
        experts = match(walk, first, groups, dtype)
    groups.add_to(walk)
    return experts


def _plain(walk: Walk, first: Node, groups: Groups, dtype: torch.dtype) -> Experts:
    fields: dict[str, Any] = {"quantisation": "none"}
    require_own_dtype(first, dtype)
    require_none(first, *SCALES)
    activation = match_activation(walk, result_of(walk, first))
    last = second_matmul(walk, activation.result, groups)
    require_own_dtype(last, dtype)
    require_none(last, *SCALES)
    fields |= {"w13_bias": tensors(first, "bias"), "w2_bias": tensors(last, "bias")}
    return experts_of(walk, first, last, {**fields, **activation.words})


def _int4(walk: Walk, first: Node, groups: Groups, dtype: torch.dtype) -> Experts:
    fields: dict[str, Any] = {"quantisation": "w4a16", "w13_bias": [], "w2_bias": []}
    activation = match_activation(walk, result_of(walk, first))
    last = second_matmul(walk, activation.result, groups)
    for node, name in ((first, "w13"), (last, "w2")):
        require_own_dtype(node, dtype)
        require_none(node, "scale", "per_token_scale", "bias")
        fields[f"{name}_scale"], fields[f"{name}_offset"] = (
            tensors(node, f"antiquant_{n}") for n in ("scale", "offset")
        )
        if not fields[f"{name}_scale"]:
            raise NotThisForm(node, "raise.weights", f"{node.name}: antiquant_scale is None", "as the other matmul")
        require_weight_dtype(node, torch.int32)
    return experts_of(walk, first, last, {**fields, **activation.words})
