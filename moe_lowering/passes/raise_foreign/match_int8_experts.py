"""Experts of int8 rows in a torch_npu chain.

    w8a8   matmul (int32) > npu_dequant_swiglu_quant > matmul
    w8a8   npu_grouped_matmul_swiglu_quant, of either version, for the first two
    w8a8   matmul (scaled) > activation > npu_dynamic_quant > matmul; or npu_swiglu_quant for the middle two, or
           custom::npu_swiglu_clip_quant, which clips too
    w4a8   the last line with int4 weights, which bring a bias

Sources: op_plugin.dequant_swiglu_quant: which half is the gate; op_plugin.gmm_swiglu_quant, op_plugin.gmm_swiglu_quant_v2:
arguments; recipes.fused_mlp: the chains that are written; recipes.swiglu_clip_quant: arguments.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from moe_lowering.passes.graph.arguments import argument
from moe_lowering.passes.graph.operator_names import call_name
from moe_lowering.passes.raise_foreign.chain_walk import (
    Walk,
    is_operator,
    other_operator,
    require,
    require_value,
    same_value_before,
    tensors,
    value_of,
)
from moe_lowering.passes.raise_foreign.group_lists import COUNTS, PREFIX_SUMS, Groups
from moe_lowering.passes.raise_foreign.match_npu_activation import clipped_words, match_npu_gate, words_of
from moe_lowering.passes.raise_foreign.npu_matmuls import (
    DTYPES,
    MATMUL,
    Experts,
    both_results,
    first_matmuls,
    make_experts,
    of_firsts,
    quantised_rows,
    require_none,
    require_weight_dtype,
    result_of,
    second_matmul,
    side_by_side,
)
from moe_lowering.passes.raise_foreign.records import NotThisForm

DEQUANTISE, SWIGLU_ROWS, CLIP_ROWS = "npu_dequant_swiglu_quant", "npu_swiglu_quant", "npu_swiglu_clip_quant"
FUSED, FUSED_V2 = "npu_grouped_matmul_swiglu_quant", "npu_grouped_matmul_swiglu_quant_v2"
INT32 = 3  # as ``output_dtype`` takes it
HALVES, INTERLEAVED, HALVES_CLAMPED = 0, 1, 2  # swiglu_mode


def match_int8(walk: Walk, rows: Node, row_scale: Node, groups: Groups) -> Experts:
    """Of int8 ``rows`` with ``row_scale``.

    Raises:
        NotThisForm: what follows the rows is no such chain.
    """
    reader, path = walk.ways(rows, "rows")[0]
    if is_operator(reader, FUSED, FUSED_V2):
        node, path = walk.onward(rows, "rows")
        made = _fused(walk, node, path, row_scale, groups)
    else:
        made = _by_matmuls(walk, first_matmuls(walk, rows, groups), row_scale, groups)
    form = made.form
    last = second_matmul(walk, made.rows, groups)
    fields: dict[str, Any] = {"quantisation": form, "w13_bias": [], "w2_bias": [], **made.words}
    fields |= _scaled((last,), made.scale, form, "w2")
    walk.read_by(made.scale, "scales of the activation", last)
    fields["out_dtype"] = dtype = value_of(result_of(walk, last)).dtype
    require_none(last, "antiquant_scale", "antiquant_offset")
    require_weight_dtype(last, torch.int32 if form == "w4a8" else torch.int8)
    for first in made.firsts:
        _require_same_dtype(first, last, dtype)
    return make_experts(walk, made.firsts, last, fields, made.smooth, made.clip)


@dataclasses.dataclass
class _Made:
    """The int8 rows of the activation and their scales; what made them, and the words of ``grouped_mlp`` for it."""

    form: str
    firsts: tuple[Node, ...]
    rows: Node
    scale: Node
    words: dict[str, Any]
    smooth: Node | None = None
    clip: Node | None = None


def _require_same_dtype(first: Node, last: Node, dtype: torch.dtype) -> None:
    if not is_operator(first, MATMUL):
        return
    if argument(first, "output_dtype") not in (INT32, DTYPES.get(dtype)):
        seen = f"{first.name}'s result is of another dtype than {last.name}'s, {dtype}"
        raise NotThisForm(first, "raise.dtype", seen, "one dtype")


def _by_matmuls(walk: Walk, firsts: tuple[Node, ...], row_scale: Node, groups: Groups) -> _Made:
    form = "w4a8" if value_of(tensors(firsts[0], "weight")[0]).dtype == torch.int32 else "w8a8"
    for first in firsts:
        require_none(first, "antiquant_scale", "antiquant_offset")
        require_weight_dtype(first, torch.int32 if form == "w4a8" else torch.int8)
    if any(argument(first, "output_dtype") == INT32 for first in firsts):
        for first in firsts:
            require(first, {"output_dtype": (INT32,)})
            require_none(first, "scale", "per_token_scale", "bias")
        firsts, sums = side_by_side(walk, firsts)
        return _dequantised(walk, form, firsts, sums, row_scale, groups)
    for first in firsts:
        _require_scaled(first, row_scale)
    walk.read_by(row_scale, "scales of rows", *firsts)
    firsts, hidden = side_by_side(walk, firsts)
    made = _activated(walk, firsts, hidden, groups)
    scales = _scaled(made.firsts, row_scale, form, "w13")
    return _Made(form, made.firsts, made.rows, made.scale, {**made.words, **scales}, clip=made.clip)


def _fused(walk: Walk, node: Node, rows: Node, row_scale: Node, groups: Groups) -> _Made:
    """Of matmul, SwiGLU and quantisation in one."""
    require_value(node, "x", rows)
    require_value(node, "x_scale", row_scale)
    second = is_operator(node, FUSED_V2)
    groups.require(node, "group_list", argument(node, "group_list_type") or PREFIX_SUMS if second else PREFIX_SUMS)
    if second:
        require(node, {"smooth_scale": (None,)}, "raise.smooth_scales")
        formats = ("x_dtype", "weight_dtype", "weight_scale_dtype", "x_scale_dtype")
        require(
            node, {**dict.fromkeys(formats, (None,)), "quant_dtype": (1, None), "dequant_dtype": (6,)}, "raise.format"
        )
        require(node, {**dict.fromkeys(("dequant_mode", "quant_mode"), (0, None)), "weight_assist_matrix": (None,)})
    else:
        require_none(node, "offset")
    require_none(node, "bias")
    weights, scales = ([*each] if isinstance(each, (list, tuple)) else [each] for each in _given(node))
    if any(value_of(each).dtype != torch.int8 for each in weights) or any(value_of(each).dim() != 2 for each in scales):
        seen = f"{node.name}: weight is {weights}, weight_scale {scales}"
        raise NotThisForm(node, "raise.weights", seen, "int8 weights [E, K, 2I] with scales [E, 2I]")
    made, scale, *rest = walk.results(node, 2 if second else 3)
    if made is None or scale is None or any(each is not None for each in rest):
        raise NotThisForm(
            node, "raise.unused", f"results of {node.name}", "rows and their scales, and none but these, read"
        )
    walk.read_by(row_scale, "scales of rows", node)
    return _Made("w8a8", (node,), made, scale, {"w13": weights, "w13_scale": scales, **words_of("swiglu")})


def _given(node: Node) -> tuple[Any, Any]:
    return argument(node, "weight"), argument(node, "weight_scale")


def _scaled(nodes: tuple[Node, ...], row_scale: Node, form: str, name: str) -> dict[str, Any]:
    """The scales of a product of int8 rows, which is one matmul, or one of gate and one of up. int4 weights bring a bias: it
    makes up for what the kernel takes off each weight."""
    fields = {f"{name}_scale": of_firsts(nodes, "scale")}
    for node in nodes:
        _require_scaled(node, row_scale)
        if form == "w8a8":
            require_none(node, "bias")
            continue
        for shape in (value_of(scale).shape for scale in tensors(node, "scale")):
            if len(shape) == 3 and shape[1] != 1:
                seen = f"{node.name}: scales {tuple(shape)} of int4 weights, by group of lines"
                raise NotThisForm(node, "raise.scale_groups", seen, "[E, N] or [E, 1, N]: one for each column")
        if not tensors(node, "bias"):
            seen = f"{node.name}: int4 weights without bias"
            raise NotThisForm(node, "raise.weights", seen, "8 * the sums of weight * scale")
    return fields if form == "w8a8" else {**fields, f"{name}_scale_bias": of_firsts(nodes, "bias")}


def _dequantised(
    walk: Walk, form: str, firsts: tuple[Node, ...], sums: tuple[Node, ...], row_scale: Node, groups: Groups
) -> _Made:
    """After ``npu_dequant_swiglu_quant``, which reads one tensor of both gate and up."""
    if len(sums) != 1:
        seen = f"int32 sums of gate and up in {sums[0].name} and {sums[1].name}"
        raise NotThisForm(sums[0], "raise.operation_between", seen, f"one tensor of both, for npu.{DEQUANTISE}")
    node, path = walk.onward(sums[0], "the first matmul's result")
    if not is_operator(node, DEQUANTISE):
        raise other_operator(node, f"int32 sums go to {call_name(node)}", f"npu.{DEQUANTISE}")
    require_value(node, "x", path)
    require_value(node, "activation_scale", row_scale)
    kind = groups.kind_of(argument(node, "group_index"))
    # Counts or pairs, whatever matmuls are told
    groups.require(node, "group_index", COUNTS if kind == PREFIX_SUMS else kind)
    require(node, {"activate_left": (True,)}, "raise.gate_second")
    require(
        node,
        {
            "bias": (None,),
            "quant_offset": (None,),
            "quant_mode": (1,),
            "dst_type": (None, 1),
            "round_mode": (None, 0),
            "activate_dim": (None, -1, 1),
        },
    )
    scale = argument(node, "weight_scale")
    if not isinstance(scale, Node) or value_of(scale).dim() != 2:
        raise NotThisForm(node, "raise.weights", f"{node.name}: weight_scale is {scale}", "[E, 2I]")
    rows, scales = both_results(walk, node)
    walk.read_by(row_scale, "scales of rows", node)
    words = {"w13_scale": [scale], **_clamped_words(node)}
    return _Made(form, firsts, rows, scales, words, argument(node, "quant_scale"))


def _clamped_words(node: Node) -> dict[str, Any]:
    """The activation that ``swiglu_mode`` and its numbers say."""
    mode = argument(node, "swiglu_mode")
    if mode == HALVES:
        return words_of("swiglu")
    if mode not in (INTERLEAVED, HALVES_CLAMPED):
        raise NotThisForm(node, "raise.activation", f"{node.name}: swiglu_mode is {mode}", "0, 1, 2")
    limit, alpha, bias = (argument(node, name) for name in ("clamp_limit", "glu_alpha", "glu_bias"))
    return clipped_words(node, limit, alpha, bias, mode == INTERLEAVED)


class _Activated(NamedTuple):
    """Int8 rows, their scales, the words of the activation, the matmuls in the order of their columns, the clips."""

    rows: Node
    scale: Node
    words: dict[str, Any]
    firsts: tuple[Node, ...]
    clip: Node | None = None


def _activated(walk: Walk, firsts: tuple[Node, ...], hidden: tuple[Node, ...], groups: Groups) -> _Activated:
    """Of hidden [N, 2I], or gate and up, in one operator or in two."""
    readers = walk.readers(hidden[0])
    alone = readers[0] if len(hidden) == len(readers) == 1 else None
    if alone is not None and is_operator(alone, CLIP_ROWS, namespace="custom"):
        return _clipped(walk, firsts, hidden[0], alone, groups)
    if alone is None or not is_operator(alone, SWIGLU_ROWS):
        activation = match_npu_gate(walk, hidden)
        rows, scale = quantised_rows(walk, activation.result, "the activation")
        return _Activated(rows, scale, activation.words, activation.ordered(firsts, hidden))
    walk.add(alone)
    require_value(alone, "x", hidden[0])
    require(alone, {"smooth_scales": (None,)}, "raise.smooth_scales")
    require(alone, {"activate_left": (True,)}, "raise.gate_second")
    require(alone, {"offsets": (None,), "group_index": (None,), "quant_mode": (1,), "dst_type": (None, torch.int8)})
    return _Activated(*both_results(walk, alone), words_of("swiglu"), firsts)


def _clipped(walk: Walk, firsts: tuple[Node, ...], hidden: Node, node: Node, groups: Groups) -> _Activated:
    """After ``custom::npu_swiglu_clip_quant``."""
    walk.add(node)
    require_value(node, "x", hidden)
    groups.require(node, "group_index", COUNTS)
    require(node, {"activate_left": (True,)}, "raise.gate_second")
    require(node, {"quant_mode": (1,), "clamp_mode": (1,)})
    clip = argument(node, "group_alpha")
    assert isinstance(clip, Node)
    return _Activated(*both_results(walk, node), words_of("swiglu"), firsts, clip)


def _require_scaled(node: Node, row_scale: Node) -> None:
    if [same_value_before(each) for each in tensors(node, "per_token_scale")] != [row_scale]:
        raise NotThisForm(
            node,
            "raise.other_value",
            f"{node.name}: per_token_scale is {argument(node, 'per_token_scale')}",
            f"[{row_scale}], the scales of its rows",
        )
    if not tensors(node, "scale"):
        raise NotThisForm(node, "raise.weights", f"{node.name}: scale is None", "the scales of its weights")
