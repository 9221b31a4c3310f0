"""Readers (``limits/calls``) of our wrappers of fused operators: they read the call that a wrapper makes of its provider.

Some rules are about what a wrapper has no argument for: columns of gate and up that alternate, routing weights on the input,
an expert map, an x that is int8 already. For those the quantity is a constant (``_CONSTANTS``).
"""

from __future__ import annotations

from typing import Any

import torch

from moe_lowering.limits.calls.tensors import Arguments, all_contiguous, dims, dtype, product, shared_dtype, size

_CONSTANTS = {
    "interleaved": False, "quantised_input": False, "has_smooth_scales": False, "has_offset": False,
    "weight_on_input": False, "has_expert_map": False, "has_block_map": True,
}  # fmt: skip


def _common_quantities(a: Arguments, limit: float) -> dict[str, Any]:
    """What the three share. ``limit`` is that of SwiGLU, 0 for none."""
    x, ids, mask, w13, w2 = a["x"], a["ids"], a["mask"], a["w13"], a["w2"]
    scales = [a["w13_scale"] or (), a["w2_scale"] or ()]
    stacked = len(w13) == 1 and dims(w13[0]) == 3
    tokens, local = size(x, 0), size(w13[0], 0) if stacked else len(w13)
    return {
        **_CONSTANTS,
        "x_dtype": dtype(x),
        "x_dims": dims(x),
        "tokens": tokens,
        "max_tokens": tokens,
        "hidden": size(x, 1),
        "intermediate": size(w2[0], -2),
        "weight_dtype": shared_dtype((*w13, *w2)),
        "weight_count": len(w13),
        "weights_contiguous": all_contiguous((*w13, *w2)),
        "stacked": stacked and dims(w2[0]) == 3,
        "ids_dtype": dtype(ids),
        "ids_tokens": size(ids, 0),
        "top_k": size(ids, 1),
        "weights_dtype": dtype(a["weights"]),
        "local_experts": local,
        "experts": local * a["ep_size"],
        "ep_size": a["ep_size"],
        "group_length": len(a["group"]),
        "activation": "swiglu_clamp" if limit else "swiglu",
        "has_mask": mask is not None,
        "mask_dtype": dtype(mask),
        "mask_dims": dims(mask),
        "mask_tokens": size(mask, 0),
        "has_scales": all(scales),
        "scale_dtype": shared_dtype([*scales[0], *scales[1]]) if any(scales) else None,
        "w13_scale_count": _elements(scales[0]),
        "w2_scale_count": _elements(scales[1]),
        "has_bias": False,
        "bias_dtype": None,
    }


def _elements(tensors: Any) -> Any:
    return sum(product(t.shape) for t in tensors) if tensors else None


def _wide(a: Arguments, shared: dict[str, Any]) -> dict[str, Any]:
    """Scales and compensation of the operators that take scales as int64: the wrappers widen float32."""
    biases = [*(a["w13_scale_bias"] or ()), *(a["w2_scale_bias"] or ())]
    widened = shared["scale_dtype"] in ("float32", "float32+int64")
    return {
        "scale_dtype": "int64" if widened else shared["scale_dtype"],
        "has_bias": bool(a["w13_scale_bias"]) and bool(a["w2_scale_bias"]),
        "bias_dtype": shared_dtype(biases) if biases else None,
    }


def dispatch_ffn_combine(a: Arguments) -> dict[str, Any]:
    """The largest T on any rank is not an argument: this rank's stands for it, and ``received`` is not known.
    ``max_output_size`` is None in a call that is judged and has no such bound."""
    shared, rows = _common_quantities(a, a["swiglu_limit"]), a["max_output_size"]
    return {**shared, **_wide(a, shared), "max_output_size": rows, "has_receive_bound": rows is not None}


def dispatch_gmm_combine_decode(a: Arguments) -> dict[str, Any]:
    """``max_tokens`` is ``global_bs // ep_size``, or this rank's own tokens when ``global_bs`` is 0."""
    shared, global_bs, ep_size = _common_quantities(a, 0.0), a["global_bs"], a["ep_size"]
    return {
        **shared,
        "max_tokens": global_bs // ep_size if global_bs and ep_size > 0 else shared["tokens"],
        "experts": a["num_experts"],
        "global_bs": global_bs,
        "shared_expert_num": 1,
        "shared_expert_rank_num": 0,
    }


def mega_moe(a: Arguments) -> dict[str, Any]:
    """The wrapper hands the mask over as int8 and the rows that a rank may receive as ``max_rows``, when not 0; None in a
    call that is judged and has no such bound."""
    shared = _common_quantities(a, a["activation_clamp"])
    rows = a["ep_size"] * a["max_tokens"] * torch.sym_min(shared["top_k"], shared["local_experts"])
    return {
        **shared,
        **_wide(a, shared),
        "max_tokens": a["max_tokens"],
        "received": a["max_rows"] or rows,
        "max_output_size": a["max_rows"] or rows,
        "has_receive_bound": a["max_rows"] is not None,
        "experts": a["num_experts"],
        "mask_dtype": None if a["mask"] is None else "int8",
        "dispatch_quant_mode": 0 if a["quantisation"] == "none" else 2,
        "combine_quant_mode": 0,
        "shared_expert_num": 0,
    }


READERS = {
    "dispatch_ffn_combine": dispatch_ffn_combine,
    "dispatch_gmm_combine_decode": dispatch_gmm_combine_decode,
    "mega_moe": mega_moe,
}
