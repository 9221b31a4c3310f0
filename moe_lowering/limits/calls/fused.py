"""Quantities of our functional wrappers of fused operators."""

from __future__ import annotations

from typing import Any

from moe_lowering.limits.calls.tensors import Arguments, contiguous, dims, dtype, shared_dtype, size


def dispatch_ffn_combine(a: Arguments) -> dict[str, Any]:
    """moe_lowering's functional wrapper of the 16-bit variant."""
    x, ids, weights, w13, w2 = a["x"], a["ids"], a["weights"], a["w13"], a["w2"]
    stacked = len(w13) == 1 and dims(w13[0]) == 3
    local_experts = size(w13[0], 0) if stacked else len(w13)
    return {
        "x_dtype": dtype(x),
        "x_dims": dims(x),
        "tokens": size(x, 0),
        "max_tokens": size(x, 0),
        "hidden": size(x, 1),
        "intermediate": size(w2[0], -2),
        "weight_dtype": shared_dtype((*w13, *w2)),
        "weights_contiguous": all(contiguous(w) for w in (*w13, *w2)),
        "ids_dtype": dtype(ids),
        "ids_tokens": size(ids, 0),
        "top_k": size(ids, 1),
        "weights_dtype": dtype(weights),
        "local_experts": local_experts,
        "experts": local_experts * a["ep_size"],
        "ep_size": a["ep_size"],
        "group_length": len(a["group"]),
        "max_output_size": a["max_output_size"],
    }


READERS = {"dispatch_ffn_combine": dispatch_ffn_combine}
