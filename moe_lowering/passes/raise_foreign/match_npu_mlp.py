"""The experts of a torch_npu chain: grouped matmul, activation, grouped matmul, as the call of the generic ``grouped_mlp``.

    none   matmul > activation > matmul, with biases or without
    w4a16  matmul (antiquant scale and offset) > activation > matmul
    w8a8   matmul (int32) > npu_dequant_swiglu_quant > matmul, of int8 rows
    w8a8   matmul (scaled) > activation > npu_dynamic_quant > matmul, likewise; or npu_swiglu_quant for the middle two
    w4a8   the same with int4 weights, which bring a bias
    rows   may become int8 by npu_dynamic_quant after they were routed

The activation is ``npu_swiglu``, ``npu_clipped_swiglu``, or written in ATen: halves or even and odd columns, clamps, silu or
gelu, a product. Rows past the sum of the counts are undefined before and after, in the chain and in what replaces it.
Sources: ops_transformer.grouped_matmul; op_plugin.dequant_swiglu_quant: which half is the gate;
recipes.fused_mlp: the chains that are written.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.passes.arguments import argument
from moe_lowering.passes.raise_foreign.chain_walk import (
    Walk,
    is_operator,
    other_operator,
    require,
    require_value,
    source_of,
    tensors,
    value_of,
)
from moe_lowering.passes.raise_foreign.match_npu_activation import clipped_words, match_activation, words_of
from moe_lowering.passes.raise_foreign.records import NotThisForm

MATMUL, QUANTISE, DEQUANTISE = "npu_grouped_matmul", "npu_dynamic_quant", "npu_dequant_swiglu_quant"
SWIGLU_ROWS = "npu_swiglu_quant"
INT32 = 3  # numbers of dtypes that ``output_dtype`` takes
DTYPES = {torch.float16: 5, torch.bfloat16: 15}
PREFIX_SUMS, COUNTS = 0, 1  # group_list_type
HALVES, INTERLEAVED, HALVES_CLAMPED = 0, 1, 2  # swiglu_mode


@dataclasses.dataclass
class Experts:
    """What a chain's experts compute: the arguments of ``grouped_mlp`` by name, but for rows, row_scale and counts.

    Attributes:
        given: those arguments.
        result: the rows that the second matmul makes, behind views.
        first, last: the two matmuls.
        h_smooth: [E, I], what the activation is multiplied by before it is quantised; None for nothing.
    """

    given: dict[str, Any]
    result: Node
    first: Node
    last: Node
    h_smooth: Node | None = None


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
        rows, row_scale = _quantised(walk, rows, "rows")
        dtype = value_of(rows).dtype
        reader, path = walk.onward(rows, "rows")
    first = _matmul(walk, reader, path, counts, kind)
    if dtype == torch.int8:
        if row_scale is None:
            raise NotThisForm(
                anchor,
                "raise.unused",
                f"scales of the int8 rows of {anchor.name} are not read",
                "a value that the form reads",
            )
        return _int8(walk, first, row_scale, counts, kind)
    if argument(first, "antiquant_scale"):
        return _int4(walk, first, counts, kind, dtype)
    return _plain(walk, first, counts, kind, dtype)


def _matmul(walk: Walk, node: Node, rows: Node, counts: Node, kind: int) -> Node:
    """A grouped matmul of all rows at once, in groups along the rows."""
    if not is_operator(node, MATMUL):
        raise other_operator(node, f"rows go to {node.target}", f"npu.{MATMUL}")
    if tensors(node, "x") != [rows]:
        raise NotThisForm(node, "raise.other_value", f"{node.name}: x is {argument(node, 'x')}", f"[{rows}]")
    formats = ("x_dtype", "weight_dtype", "scale_dtype", "per_token_scale_dtype")
    require(node, dict.fromkeys(formats, (None,)), "raise.format")
    rest = ("offset", "activation_input", "activation_quant_scale", "activation_quant_offset")
    none = dict.fromkeys(rest, (None,))
    require(node, {**none, "split_item": (2, 3), "group_type": (0,), "act_type": (0, None)})
    require(node, {"group_list_type": (kind,)}, "raise.counts")
    require_value(node, "group_list", counts, "raise.counts")
    if not tensors(node, "weight"):
        raise NotThisForm(node, "raise.weights", f"{node.name}: weight is {argument(node, 'weight')}", "a list")
    return node


def _result(walk: Walk, matmul: Node) -> Node:
    """The only result of a matmul."""
    output = walk.results(matmul, 1)[0]
    if output is None:
        raise NotThisForm(
            matmul, "raise.unused", f"the result of {matmul.name} is not read", "a value that the form reads"
        )
    return output


def _second(walk: Walk, rows: Node, counts: Node, kind: int) -> Node:
    reader, path = walk.onward(rows, "the activation's result")
    return _matmul(walk, reader, path, counts, kind)


_SCALES = ("scale", "per_token_scale", "antiquant_scale", "antiquant_offset")


def _without(node: Node, *names: str) -> None:
    require(node, dict.fromkeys(names, (None,)))


def _plain(walk: Walk, first: Node, counts: Node, kind: int, dtype: torch.dtype) -> Experts:
    last = None
    fields: dict[str, Any] = {"quantisation": "none"}
    _own_dtype(first, dtype)
    _without(first, *_SCALES)
    activation = match_activation(walk, _result(walk, first))
    last = _second(walk, activation.result, counts, kind)
    _own_dtype(last, dtype)
    _without(last, *_SCALES)
    fields |= {"w13_bias": tensors(first, "bias"), "w2_bias": tensors(last, "bias")}
    return _experts(walk, first, last, {**fields, **activation.words})


def _int4(walk: Walk, first: Node, counts: Node, kind: int, dtype: torch.dtype) -> Experts:
    fields: dict[str, Any] = {"quantisation": "w4a16", "w13_bias": [], "w2_bias": []}
    activation = match_activation(walk, _result(walk, first))
    last = _second(walk, activation.result, counts, kind)
    for node, name in ((first, "w13"), (last, "w2")):
        _own_dtype(node, dtype)
        _without(node, "scale", "per_token_scale", "bias")
        fields[f"{name}_scale"], fields[f"{name}_offset"] = (
            tensors(node, f"antiquant_{n}") for n in ("scale", "offset")
        )
        if not fields[f"{name}_scale"]:
            raise NotThisForm(node, "raise.weights", f"{node.name}: antiquant_scale is None", "as the other matmul")
        _weight_dtype(node, torch.int32)
    return _experts(walk, first, last, {**fields, **activation.words})


def _int8(walk: Walk, first: Node, row_scale: Node, counts: Node, kind: int) -> Experts:
    """int8 rows: sums that ``npu_dequant_swiglu_quant`` scales, or scaled rows that are quantised again."""
    form = "w4a8" if value_of(tensors(first, "weight")[0]).dtype == torch.int32 else "w8a8"
    fields: dict[str, Any] = {"quantisation": form, "w13_bias": [], "w2_bias": []}
    smooth: Node | None = None
    if argument(first, "output_dtype") == INT32:
        _without(first, "scale", "per_token_scale", "bias")
        rows, scale, words, smooth = _dequantised(walk, _result(walk, first), row_scale, counts, kind)
        fields |= words
        walk.read_by(row_scale, "scales of rows", *_readers_of(row_scale, DEQUANTISE))
    else:
        fields |= _scaled(first, row_scale, form, "w13")
        walk.read_by(row_scale, "scales of rows", first)
        rows, scale, words = _activated(walk, _result(walk, first))
        fields |= words
    last = _second(walk, rows, counts, kind)
    fields |= _scaled(last, scale, form, "w2")
    walk.read_by(scale, "scales of the activation", last)
    fields["out_dtype"] = dtype = value_of(_result(walk, last)).dtype
    for node in (first, last):
        _without(node, "antiquant_scale", "antiquant_offset")
        _weight_dtype(node, torch.int32 if form == "w4a8" else torch.int8)
    if argument(first, "output_dtype") not in (INT32, DTYPES.get(dtype)):
        seen = f"{first.name}'s result is of another dtype than {last.name}'s, {dtype}"
        raise NotThisForm(first, "raise.dtype", seen, "one dtype")
    return _experts(walk, first, last, fields, smooth)


def _scaled(node: Node, row_scale: Node, form: str, name: str) -> dict[str, Any]:
    """The scales of a matmul of int8 rows. int4 weights bring a bias: it makes up for what the kernel takes off each weight."""
    _scaled_by(node, row_scale)
    fields = {f"{name}_scale": tensors(node, "scale")}
    if form == "w8a8":
        _without(node, "bias")
        return fields
    if not tensors(node, "bias"):
        raise NotThisForm(
            node, "raise.weights", f"{node.name}: int4 weights without bias", "8 * the sums of weight * scale"
        )
    return {**fields, f"{name}_scale_bias": tensors(node, "bias")}


def _readers_of(node: Node, name: str) -> list[Node]:
    return [user for user in node.users if is_operator(user, name)][:1]


def _dequantised(
    walk: Walk, sums: Node, row_scale: Node, counts: Node, kind: int
) -> tuple[Node, Node, dict[str, Any], Node | None]:
    """(rows, their scales, the words of the activation with w13's scale, smooth scales) after ``npu_dequant_swiglu_quant``."""
    node, path = walk.onward(sums, "the first matmul's result")
    if not is_operator(node, DEQUANTISE):
        raise other_operator(node, f"int32 sums go to {node.target}", f"npu.{DEQUANTISE}")
    require_value(node, "x", path)
    require_value(node, "activation_scale", row_scale)
    require_value(node, "group_index", counts, "raise.counts")
    if kind == PREFIX_SUMS:  # it reads them as counts, whatever the matmuls were told
        raise NotThisForm(node, "raise.counts", f"{node.name}: group_index are prefix sums", "counts, or pairs")
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
    rows, scales = _pair(walk, node)
    return rows, scales, {"w13_scale": [scale], **_clamped_words(node)}, argument(node, "quant_scale")


def _clamped_words(node: Node) -> dict[str, Any]:
    """The activation that ``swiglu_mode`` and its numbers say."""
    mode = argument(node, "swiglu_mode")
    if mode == HALVES:
        return words_of("swiglu")
    if mode not in (INTERLEAVED, HALVES_CLAMPED):
        raise NotThisForm(node, "raise.activation", f"{node.name}: swiglu_mode is {mode}", "0, 1, 2")
    limit, alpha, bias = (argument(node, name) for name in ("clamp_limit", "glu_alpha", "glu_bias"))
    return clipped_words(node, limit, alpha, bias, mode == INTERLEAVED)


def _activated(walk: Walk, hidden: Node) -> tuple[Node, Node, dict[str, Any]]:
    """(rows, their scales, the words of the activation) of hidden [N, 2I], in one operator or in two."""
    readers = walk.readers(hidden)
    if len(readers) != 1 or not is_operator(readers[0], SWIGLU_ROWS):
        activation = match_activation(walk, hidden)
        return *_quantised(walk, activation.result, "the activation"), activation.words
    (node,) = readers
    walk.add(node)
    require_value(node, "x", hidden)
    require(node, {"smooth_scales": (None,)}, "raise.smooth_scales")
    require(node, {"activate_left": (True,)}, "raise.gate_second")
    require(node, {"offsets": (None,), "group_index": (None,), "quant_mode": (1,), "dst_type": (None, torch.int8)})
    return *_pair(walk, node), words_of("swiglu")


def _pair(walk: Walk, node: Node) -> tuple[Node, Node]:
    """Both results of an operator that quantises."""
    rows, scales = walk.results(node, 2)
    if rows is None or scales is None:
        raise NotThisForm(node, "raise.unused", f"a result of {node.name} is not read", "a value that the form reads")
    return rows, scales


def _quantised(walk: Walk, rows: Node, what: str) -> tuple[Node, Node]:
    """Rows and their scales after ``npu_dynamic_quant``."""
    node, path = walk.onward(rows, what)
    if not is_operator(node, QUANTISE):
        raise other_operator(node, f"{what} goes to {node.target}", f"npu.{QUANTISE}")
    require_value(node, "input", path)
    require(node, {"smooth_scales": (None,)}, "raise.smooth_scales")
    require(node, {"group_index": (None,), "dst_type": (None, 1), "quant_mode": ("pertoken",), "dst_type_max": (0.0,)})
    return _pair(walk, node)


def _scaled_by(node: Node, row_scale: Node) -> None:
    if [source_of(each) for each in tensors(node, "per_token_scale")] != [row_scale]:
        raise NotThisForm(
            node,
            "raise.other_value",
            f"{node.name}: per_token_scale is {argument(node, 'per_token_scale')}",
            f"[{row_scale}], the scales of its rows",
        )
    if not tensors(node, "scale"):
        raise NotThisForm(node, "raise.weights", f"{node.name}: scale is None", "the scales of its weights")


def _own_dtype(node: Node, dtype: torch.dtype) -> None:
    """The result of a matmul has the dtype of its rows."""
    require(node, {"output_dtype": (None, DTYPES.get(dtype))}, "raise.dtype")


def _weight_dtype(node: Node, dtype: torch.dtype) -> None:
    for weight in tensors(node, "weight"):
        if value_of(weight).dtype != dtype:
            raise NotThisForm(
                node, "raise.weights", f"{node.name}: weight is {value_of(weight).dtype}", f"{dtype} for its rows"
            )


def _experts(walk: Walk, first: Node, last: Node, fields: dict[str, Any], smooth: Node | None = None) -> Experts:
    fields |= {"w13": tensors(first, "weight"), "w2": tensors(last, "weight")}
    return Experts(fields, _result(walk, last), first, last, smooth)
