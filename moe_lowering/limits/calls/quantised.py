"""Readers (``limits/calls``) of a quantised MLP's operators: dynamic quantisation, and matmul or SwiGLU fused with it."""

from __future__ import annotations

import math
from typing import Any

from moe_lowering.limits.calls.matmul import dtype_form, unpacked_size
from moe_lowering.limits.calls.tensors import Arguments, contiguous, dims, dtype, first, product, size

INT8 = 1  # torch's ScalarType number of int8, which torch_npu's int arguments take


def _group_list(group_list: Any) -> dict[str, Any]:
    return {
        "group_list_dtype": dtype(group_list),
        "group_list_dims": dims(group_list),
        "group_list_length": size(group_list, 0),
    }


def dynamic_quant(a: Arguments) -> dict[str, Any]:
    """``npu_dynamic_quant``; ``smooth`` is smooth_scales, one row of it for each group when there are groups."""
    x, smooth, groups = a["input"], a["smooth_scales"], a["group_index"]
    return {
        "x_dtype": dtype(x),
        "x_dims": dims(x),
        "rows": size(x, -2),
        "hidden": size(x, -1),
        "dst_type": INT8 if a["dst_type"] is None else a["dst_type"],
        "dst_type_max": a["dst_type_max"],
        "quant_mode": a["quant_mode"],
        "has_smooth": smooth is not None,
        "smooth_dtype": dtype(smooth),
        "smooth_dims": dims(smooth),
        "smooth_groups": size(smooth, 0) if dims(smooth) == 2 else None,
        "smooth_width": size(smooth, -1),
        "has_groups": groups is not None,
        **_group_list(groups),
    }


def _swiglu_quant(a: Arguments, weight: Any, weight_scale: Any) -> dict[str, Any]:
    """What both versions of the fused matmul, SwiGLU and quantisation share."""
    x, x_scale, bias = a["x"], a["x_scale"], a["bias"]
    return {
        "form": dtype_form(x, weight, True),
        "weights_contiguous": contiguous(weight),
        "x_dtype": dtype(x),
        "x_dims": dims(x),
        "rows": size(x, 0),
        "hidden": unpacked_size(x, -1),
        "weight_dtype": dtype(weight),
        "weight_dims": dims(weight),
        "groups": size(weight, 0),
        "n": size(weight_scale, -1),
        "scale_dtype": dtype(weight_scale),
        "scale_dims": dims(weight_scale),
        "scale_groups": size(weight_scale, 0),
        "x_scale_dtype": dtype(x_scale),
        "x_scale_dims": dims(x_scale),
        "x_scale_rows": size(x_scale, 0),
        "has_bias": bias is not None,
        "bias_dtype": dtype(bias),
        **_group_list(a["group_list"]),
    }


def grouped_matmul_swiglu_quant(a: Arguments) -> dict[str, Any]:
    """Version 1: prefix sums as group list; ``bias`` is the assist matrix of int4 weights."""
    return {**_swiglu_quant(a, a["weight"], a["weight_scale"]), "has_offset": a["offset"] is not None}


def grouped_matmul_swiglu_quant_v2(a: Arguments) -> dict[str, Any]:
    """Version 2: modes and dtypes as arguments, lists of one weight and one scale."""
    overrides = ("x_dtype", "weight_dtype", "weight_scale_dtype", "x_scale_dtype")
    modes = ("dequant_mode", "dequant_dtype", "quant_mode", "quant_dtype", "group_list_type")
    return {
        **_swiglu_quant(a, first(a["weight"]), first(a["weight_scale"])),
        "weight_count": len(a["weight"]),
        "scale_count": len(a["weight_scale"]),
        "has_smooth": a["smooth_scale"] is not None,
        "has_assist": bool(a["weight_assist_matrix"]),
        "has_overrides": any(a[name] is not None for name in overrides),
        **{name: a[name] for name in modes},
    }


def dequant_swiglu_quant(a: Arguments) -> dict[str, Any]:
    """``npu_dequant_swiglu_quant``; ``intermediate`` is half of the last axis of x."""
    x, weight_scale, activation_scale = a["x"], a["weight_scale"], a["activation_scale"]
    groups, width = a["group_index"], size(x, -1)
    return {
        "x_dtype": dtype(x),
        "x_dims": dims(x),
        "rows": size(x, 0),
        "width": width,
        "intermediate": None if width is None else width // 2,
        "has_weight_scale": weight_scale is not None,
        "scale_dtype": dtype(weight_scale),
        "scale_dims": dims(weight_scale),
        "scale_width": size(weight_scale, -1),
        "scale_groups": size(weight_scale, 0) if dims(weight_scale) == 2 else None,
        "has_x_scale": activation_scale is not None,
        "x_scale_dtype": dtype(activation_scale),
        "x_scale_rows": size(activation_scale, 0),
        "has_bias": a["bias"] is not None,
        "has_quant_offset": a["quant_offset"] is not None,
        "has_groups": groups is not None,
        "dst_type": INT8 if a["dst_type"] is None else a["dst_type"],
        "activate_dim": -1 if a["activate_dim"] is None else a["activate_dim"],
        "quant_mode": a["quant_mode"],
        "swiglu_mode": a["swiglu_mode"],
        "has_clamps": a["swiglu_mode"] != 0,
        "has_clamped_halves": a["swiglu_mode"] == 2,
        "activate_left": a["activate_left"],
        "has_clamp_limit": 0 < a["clamp_limit"] < math.inf,
        **_group_list(groups),
    }


def swiglu_quant(a: Arguments) -> dict[str, Any]:
    """``npu_swiglu_quant``."""
    x, smooth = a["x"], a["smooth_scales"]
    return {
        "x_dtype": dtype(x),
        "x_dims": dims(x),
        "rows": None if x is None else product(x.shape[:-1]),
        "width": size(x, -1),
        "has_smooth": smooth is not None,
        "smooth_dtype": dtype(smooth),
        "has_offsets": a["offsets"] is not None,
        "quant_mode": a["quant_mode"],
        "group_list_type": a["group_list_type"],
        "dst_dtype": "int8" if a["dst_type"] is None else str(a["dst_type"]).removeprefix("torch."),
        **_group_list(a["group_index"]),
    }


def swiglu_clip_quant(a: Arguments) -> dict[str, Any]:
    """``custom::npu_swiglu_clip_quant``; ``clips`` are the entries of ``group_alpha``."""
    x, clip = a["x"], a["group_alpha"]
    return {
        "x_dtype": dtype(x),
        "x_dims": dims(x),
        "rows": size(x, 0),
        "width": size(x, -1),
        "clip_dtype": dtype(clip),
        "clip_dims": dims(clip),
        "clips": size(clip, 0),
        "quant_mode": a["quant_mode"],
        "clamp_mode": a["clamp_mode"],
        **_group_list(a["group_index"]),
    }


READERS = {
    "npu_dynamic_quant": dynamic_quant,
    "npu_grouped_matmul_swiglu_quant": grouped_matmul_swiglu_quant,
    "npu_grouped_matmul_swiglu_quant_v2": grouped_matmul_swiglu_quant_v2,
    "npu_dequant_swiglu_quant": dequant_swiglu_quant,
    "npu_swiglu_quant": swiglu_quant,
    "npu_swiglu_clip_quant": swiglu_clip_quant,
}
