"""Readers (``limits/calls``) of the grouped matmul and of the activations that stand between two of them."""

from __future__ import annotations

from typing import Any

import torch

from moe_lowering.limits.calls.tensors import (
    Arguments,
    all_contiguous,
    contiguous,
    dims,
    dtype,
    first,
    product,
    shared_dtype,
    size,
)

_SCALES = ("scale", "offset", "antiquant_scale", "antiquant_offset", "per_token_scale")
_RESERVED = ("activation_input", "activation_quant_scale", "activation_quant_offset")
# Numbers of torch_npu's argument output_dtype (torch's own ScalarType numbers).
_OUTPUT_DTYPES = {None: "None", 1: "int8", 3: "int32", 5: "float16", 6: "float32", 15: "bfloat16"}
_FORMS = {
    ("int8", "int8"): "a8w8",
    ("int8", "int32"): "a8w4",
    ("int32", "int32"): "a4w4",
    **{(x, "int8"): "a16w8" for x in ("float16", "bfloat16")},
    **{(x, "int32"): "a16w4" for x in ("float16", "bfloat16")},
}
PACKED = 8  # int4 values in one int32


def dtype_form(x: Any, weight: Any, has_scales: bool) -> str:
    """``a8w8`` for int8 activations and weights, ...; int32 stands for eight packed int4; ``none`` when not quantised."""
    known = _FORMS.get((str(dtype(x)), str(dtype(weight))))
    if known is not None:
        return known
    floating = all(t is None or t.is_floating_point() for t in (x, weight))
    return "none" if floating and not has_scales else "other"


def unpacked_size(tensor: Any, axis: int) -> Any:
    """The size of an axis in numbers, where an int32 tensor holds eight int4 in each element along it."""
    n = size(tensor, axis)
    return n * PACKED if n is not None and tensor.dtype == torch.int32 else n


def grouped_matmul(a: Arguments) -> dict[str, Any]:
    """Names: ``k`` and ``n`` of the first weight, ``hidden`` the inner size of x, ``groups`` the number of groups."""
    x, weight = a["x"], a["weight"]
    single = len(weight) == 1 and dims(weight[0]) == 3
    group_list = None if isinstance(a["group_list"], (list, tuple)) else a["group_list"]  # the older overload's ints
    floating = all(t.is_floating_point() for t in (*x, *weight))
    return {
        "x_dtype": dtype(first(x)),
        "x_dims": dims(first(x)),
        "x_count": len(x),
        "rows": size(first(x), 0),
        "hidden": unpacked_size(first(x), -1),
        "weight_dtype": shared_dtype((*x, *weight)),
        "weight_dims": dims(first(weight)),
        "weight_count": len(weight),
        "weights_alike": len({(dims(w), str(size(w, -2)), str(size(w, -1))) for w in weight}) <= 1,
        "single_weight": single,
        "weights_contiguous": all_contiguous(weight),
        "k": size(first(weight), -2),
        "n": unpacked_size(first(weight), -1),
        "groups": size(first(weight), 0) if single else len(weight),
        "quantised": not floating or any(a.get(name) for name in _SCALES),
        "form": dtype_form(first(x), first(weight), any(a.get(name) for name in _SCALES)),
        "has_reserved": any(a.get(name) for name in _RESERVED),
        "has_group_list": a["group_list"] is not None,
        "group_list_dtype": dtype(group_list),
        "group_list_dims": dims(group_list),
        "group_list_length": size(group_list, 0),
        # As text: rules are not applied to a quantity that is None, and None is refused here
        "group_type": "None" if a["group_type"] is None else a["group_type"],
        "output_dtype": _OUTPUT_DTYPES.get(a["output_dtype"], "other"),
        **{name: a[name] for name in ("group_list_type", "split_item", "act_type")},
        **_bias(a["bias"]),
        **_scales(a),
    }


def _bias(bias: Any) -> dict[str, Any]:
    tensor = first(bias)
    return {
        "has_bias": tensor is not None,
        "bias_dtype": dtype(tensor),
        "bias_count": len(bias) if bias else None,
        "bias_groups": size(tensor, 0) if dims(tensor) == 2 else None,
        "bias_width": size(tensor, -1),
        "bias_dims": dims(tensor),
    }


def _scales(a: Arguments) -> dict[str, Any]:
    scale, per_token, antiquant, offset = (
        first(a[name]) for name in ("scale", "per_token_scale", "antiquant_scale", "antiquant_offset")
    )
    return {
        "has_offset": bool(a["offset"]),
        "has_scale": scale is not None,
        "scale_count": len(a["scale"]) if scale is not None else None,
        "scale_dtype": dtype(scale),
        "scale_dims": dims(scale),
        "scale_groups": size(scale, 0) if dims(scale) in (2, 3) else None,
        "scale_width": size(scale, -1),
        "has_per_token_scale": per_token is not None,
        "per_token_dtype": dtype(per_token),
        "per_token_dims": dims(per_token),
        "per_token_rows": size(per_token, 0),
        "has_antiquant_scale": antiquant is not None,
        "antiquant_count": len(a["antiquant_scale"]) if antiquant is not None else None,
        "antiquant_dtype": dtype(antiquant),
        "antiquant_dims": dims(antiquant),
        "antiquant_width": size(antiquant, -1),
        "antiquant_offset_count": len(a["antiquant_offset"]) if offset is not None else None,
        "antiquant_offset_dtype": dtype(offset),
        "antiquant_offset_dims": dims(offset),
    }


def gate_quantities(x: Any, dim: int) -> dict[str, Any]:
    """Quantities of an operator that halves axis ``dim`` of x; ``intermediate`` is the halved size."""
    width = size(x, dim)
    axis = None if width is None else dim % len(x.shape)
    return {
        "x_dtype": dtype(x),
        "x_dims": dims(x),
        "dim": dim,
        "width": width,
        "intermediate": None if width is None else width // 2,
        "rows": None if axis is None else product([n for i, n in enumerate(x.shape) if i != axis]),
    }


def swiglu(a: Arguments) -> dict[str, Any]:
    return gate_quantities(a["input"], a["dim"])


def clipped_swiglu(a: Arguments) -> dict[str, Any]:
    group_index = a["group_index"]
    return {
        **gate_quantities(a["x"], a["dim"]),
        "contiguous": contiguous(a["x"]),
        "group_index_dtype": dtype(group_index),
        "group_index_dims": dims(group_index),
    }


READERS = {
    "npu_grouped_matmul": grouped_matmul,
    "npu_swiglu": swiglu,
    "npu_clipped_swiglu": clipped_swiglu,
}
