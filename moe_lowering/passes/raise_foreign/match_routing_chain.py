"""``npu_moe_init_routing_v2`` > experts > ``npu_moe_finalize_routing`` or ``npu_moe_token_unpermute``: a block of one rank.

The anchor is init_routing_v2. Proven, each from literal arguments or by the identity of nodes:
1. it takes every slot: no capacity, no drop, active_num all rows or none; and the full range of experts, or the first ones, where
   slots of the others weigh nothing: these are zero experts;
2. the experts compute ``grouped_mlp`` on its rows and scales, in groups of its counts, which are prefix sums, counts or
   pairs (expert, count), with the group_list_type that means the same;
3. the way back takes these rows and the row index of this routing, by row (drop_pad_mode 2), or its absolute value: with the
   full range no entry is negative;
4. nothing of it is read elsewhere.

What a model does with the result (an all_reduce, where experts are sharded over a TP group) is linear in it and stays outside;
``skip1`` and ``skip2`` are added before it, as they were. Weights have been rounded to the dtype of the rows: that stays.
Sources: ops_transformer.init_routing, ops_transformer.token_unpermute, op_plugin.finalize_routing: arguments;
recipes.fused_mlp: what is written.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import size_key
from moe_lowering.passes.graph.arguments import argument, input_node
from moe_lowering.passes.graph.operator_names import call_name
from moe_lowering.passes.raise_foreign.chain_walk import (
    Walk,
    equal_values,
    is_operator,
    other_operator,
    require,
    require_value,
    same_sizes,
    same_value_before,
    value_of,
)
from moe_lowering.passes.raise_foreign.masked_weights import weights_before_mask
from moe_lowering.passes.raise_foreign.match_npu_mlp import match_npu_experts
from moe_lowering.passes.raise_foreign.npu_chain import Chain
from moe_lowering.passes.raise_foreign.records import NotThisForm

aten = torch.ops.aten
ROUTE, FINALIZE, UNPERMUTE = "npu_moe_init_routing_v2", "npu_moe_finalize_routing", "npu_moe_token_unpermute"
NO_QUANT, DYNAMIC = -1, 1  # quant_mode
# drop_pad_mode of finalize_routing: the index of choice k of token t is at t * K + k; in 3 it may be -1, for no row
BY_ROW, BY_ROW_DROP = 2, 3
COUNTS = 1  # expert_tokens_num_type, as group_list_type: 0 prefix sums, 1 counts, 2 pairs


def match_routing(route: Node, deployment: Deployment) -> Chain:
    """The chain that begins with a routing.

    Raises:
        NotThisForm: it is none that the generic operators say.
    """
    experts = argument(route, "expert_num")
    first, last = argument(route, "active_expert_range") or (0, experts)
    whole = (first, last) == (0, experts)
    if deployment.ep_size != 1 and whole:
        raise NotThisForm(
            route,
            "raise.other_group",
            f"{route.name} has all experts on this rank, and ep_size is {deployment.ep_size}",
            "ep_size 1, or the range of this rank's experts",
        )
    return match_range(route, None) if whole or first != 0 else _some_experts(route, experts, last)


def _some_experts(route: Node, numbers: int, experts: int) -> Chain:
    """Ids from ``experts`` on have no row, and give nothing: they are zero experts."""
    chain = match_range(route, [0, experts])
    if not chain.drops:
        weights_before_mask(chain.weights, route, 0, experts)
    sent = {**chain.sent, "num_experts": experts, "zero_experts": numbers - experts}
    return dataclasses.replace(chain, sent=sent)


def match_range(route: Node, own_range: list[int] | None) -> Chain:
    """The chain that begins with a routing to the experts of a range, None for all: all but what becomes of others' experts.

    Raises:
        NotThisForm: it is none that the generic operators say.
    """
    walk = Walk()
    experts_in_all = _check_route(route, own_range)
    rows, index, counts, scales = walk.results(route, 4)
    travels = value_of(argument(route, "x")).dtype == torch.int8  # with a scale for each token
    quantises = travels or argument(route, "quant_mode") == DYNAMIC
    kind = argument(route, "expert_tokens_num_type")
    experts = match_npu_experts(walk, rows, scales if quantises else None, counts, kind, route)
    _check_types(route, experts.result)
    back, rows_back, order = _back(walk, experts.result)
    walk.add(back)
    weights, added = way_back(walk, back, rows_back, index, order)
    check_weights(argument(route, "expert_idx"), back, weights)
    if not quantises:
        walk.read_by(scales, "the routing's scales")
    return Chain(
        form="routing_v2",
        own="allgather",
        walk=walk,
        dispatch=route,
        experts=experts,
        combine=back,
        sent={
            "x": argument(route, "x"),
            "x_scale": argument(route, "scale") if travels else None,
            "ids": argument(route, "expert_idx"),
            "mask": None,
            "num_experts": experts_in_all,
        },
        weights=weights,
        counts=counts if kind == COUNTS else None,
        added=added,
        x_smooth=None if travels else argument(route, "scale"),
        drops=order == BY_ROW_DROP and not _is_absolute(back),
    )


def _check_route(node: Node, own_range: list[int] | None) -> int:
    experts = argument(node, "expert_num")
    counted = {"expert_tokens_num_flag": (True,), "expert_tokens_num_type": (0, 1, 2)}
    require(node, {"offset": (None,), "drop_pad_mode": (0,), "row_idx_type": (0,), **counted})
    require(node, {"quant_mode": (NO_QUANT, DYNAMIC), "x_dtype": (None,)}, "raise.format")
    if type(experts) is not int or experts < 1:
        raise NotThisForm(node, "raise.experts", f"{node.name}: expert_num is {experts!r}", "the number of experts")
    kept = list(argument(node, "active_expert_range") or [0, experts])
    accepted = own_range or [0, experts]
    if kept != accepted:
        raise NotThisForm(
            node,
            "raise.partial_range",
            f"{node.name}: active_expert_range is {kept}",
            f"{accepted}, " + ("the experts of this rank" if own_range else "all experts"),
        )
    _check_rows(node)
    return experts


def _check_rows(node: Node) -> None:
    """``active_num`` keeps every row: -1, 0, or T * k."""
    active, ids = argument(node, "active_num"), value_of(argument(node, "expert_idx"))
    number = active.meta.get("val") if isinstance(active, Node) else active
    slots = ids.shape[0] * ids.shape[1]
    if type(number) is int and number <= 0:
        return
    if number is None or not (size_key(number) == size_key(slots) or statically_known_true(number == slots)):
        raise NotThisForm(node, "raise.rows", f"{node.name}: active_num is {number}", f"-1, or all {slots} rows")


def _check_types(route: Node, result: Node) -> None:
    x, output, ids = value_of(argument(route, "x")), value_of(result), value_of(argument(route, "expert_idx"))
    if x.dtype == torch.int8:
        _check_scale(route, x)
    elif x.dim() != 2 or x.dtype != output.dtype or not x.dtype.is_floating_point:
        raise NotThisForm(
            route,
            "raise.dtype",
            f"x is {x.dtype} {tuple(x.shape)}, the experts' result {output.dtype}",
            "[T, H], both of one floating dtype",
        )
    if ids.dim() != 2 or ids.dtype != torch.int32:
        raise NotThisForm(route, "raise.dtype", f"expert_idx is {ids.dtype} {tuple(ids.shape)}", "int32 [T, k]")


def _check_scale(route: Node, x: torch.Tensor) -> None:
    """int8 tokens bring a scale each, and are not quantised once more."""
    scale = argument(route, "scale")
    value = value_of(scale) if isinstance(scale, Node) else None
    if value is None or value.dim() != 1 or value.dtype != torch.float32 or x.dim() != 2:
        raise NotThisForm(route, "raise.dtype", f"int8 tokens with scale {scale}", "[T, H] with float32 scales [T]")
    require(route, {"quant_mode": (NO_QUANT,)})


def _back(walk: Walk, result: Node) -> tuple[Node, Node, int]:
    """(the operator that brings rows back, the rows that it reads, its drop_pad_mode): mode 3 takes rows [N, 1, H]."""
    back, rows = walk.onward(result, "the experts' result")
    shape = [*map(size_key, value_of(result).shape)]
    padded = back.target in _PADS and [*map(size_key, value_of(back).shape)] == [shape[0], 1, *shape[1:]]
    padded = padded and (back.target is not aten.unsqueeze.default or argument(back, "dim") in (1, -2))
    if not padded:
        return back, rows, BY_ROW
    walk.add(back)
    return *walk.onward(back, "the experts' result"), BY_ROW_DROP


_PADS = (aten.unsqueeze.default, aten.view.default, aten.reshape.default)


def _is_absolute(back: Node) -> bool:
    index = argument(back, "expanded_src_to_dst_row")
    return isinstance(index, Node) and same_value_before(index).target is aten.abs.default


def way_back(
    walk: Walk, node: Node, rows: Node, index: Node | None, order: int = BY_ROW
) -> tuple[Any, tuple[Node, ...]]:
    """(weights [T, k], what is added) of the operator that brings rows back to tokens.

    Args:
        index: the row of each slot; in ``order``, a drop_pad_mode of finalize_routing.
    """
    if is_operator(node, UNPERMUTE) and order == BY_ROW:
        require(node, {"padded_mode": (False,), "restore_shape": (None,)})
        require_value(node, "permuted_tokens", rows)
        _check_index(walk, node, "sorted_indices", index)
        return argument(node, "probs"), ()
    if is_operator(node, FINALIZE):
        require(node, {"bias": (None,), "drop_pad_mode": (order,) if order else (order, None)})
        require_value(node, "expanded_permuted_rows", rows)
        _check_index(walk, node, "expanded_src_to_dst_row", index)
        skips = tuple(skip for skip in (argument(node, "skip1"), argument(node, "skip2")) if isinstance(skip, Node))
        for skip in skips:
            _require_like_result(node, skip)
        return argument(node, "scales"), skips
    known = f"npu.{UNPERMUTE} or npu.{FINALIZE}" if order == BY_ROW else f"npu.{FINALIZE}"
    raise other_operator(node, f"the experts' result goes to {call_name(node)}", known)


def _require_like_result(node: Node, skip: Node) -> None:
    result, value = value_of(node), value_of(skip)
    if value.dtype != result.dtype or not same_sizes(value, result):
        seen = f"{node.name}: {skip.name}, which is added, is {value.dtype} {tuple(value.shape)}"
        raise NotThisForm(node, "raise.dtype", seen, f"{result.dtype} {tuple(result.shape)}")


def _check_index(walk: Walk, node: Node, name: str, index: Node | None) -> None:
    """The row index of the routing, or its absolute value, read by the way back alone."""
    value = argument(node, name)
    source = same_value_before(value) if isinstance(value, Node) else None
    between = []
    if source is not None and source.target is aten.abs.default:
        between, source = [source], same_value_before(input_node(source))
    if index is None or not equal_values(source, index):
        raise NotThisForm(node, "raise.index", f"{node.name}: {name} is {value!r}", "the row index of the same routing")
    current: Node = index
    while current is not node:
        reader, _ = walk.onward(current, "the row index")
        if reader is not node and reader not in between:
            raise NotThisForm(node, "raise.index", f"the row index goes to {reader.name}", f"{node.name}")
        walk.add(reader)
        current = reader


def check_weights(expert_ids: Node, back: Node, weights: Any) -> None:
    """They are one number for each slot."""
    ids = value_of(expert_ids)
    if not isinstance(weights, Node):
        raise NotThisForm(back, "raise.no_weights", f"{back.name} takes no weights", "weights [T, k]")
    value = value_of(weights)
    if not same_sizes(value, ids) or not value.is_floating_point():
        raise NotThisForm(
            back,
            "raise.weights",
            f"{weights.name} is {value.dtype} {tuple(value.shape)}",
            f"[T, k] = {tuple(ids.shape)}",
        )
