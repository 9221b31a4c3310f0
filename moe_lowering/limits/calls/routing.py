"""Readers (``limits/calls``) of the local routing operators: gating, init_routing, (un)permute, finalize, re-routing."""

from __future__ import annotations

from typing import Any

from moe_lowering.limits.calls.tensors import Arguments, dims, dtype, size


def gating(a: Arguments) -> dict[str, Any]:
    x, bias = a["x"], a["bias"]
    return {
        "x_dtype": dtype(x),
        "x_dims": dims(x),
        "tokens": size(x, 0),
        "experts": size(x, 1),
        "top_k": a["k"],
        "bias_dtype": dtype(bias),
        "bias_dims": dims(bias),
        "bias_length": size(bias, 0),
        "has_hash": a["input_ids"] is not None or a["tid2eid"] is not None,
        **{name: a[name] for name in ("k_group", "group_count", "group_select_mode", "renorm", "norm_type")},
    }


def gating_softmax(a: Arguments) -> dict[str, Any]:
    """Both versions of ``npu_moe_gating_top_k_softmax``."""
    x, finished = a["x"], a["finished"]
    return {
        "x_dtype": dtype(x),
        "x_dims": dims(x),
        "experts": size(x, -1),
        "top_k": a["k"],
        "finished_dtype": dtype(finished),
        "finished_dims": dims(finished),
        "renorm": a.get("renorm") or 0,
        "output_softmax": bool(a.get("output_softmax")),
    }


def init_routing_v1(a: Arguments) -> dict[str, Any]:
    """``npu_moe_init_routing``; ``row`` is row_idx."""
    x, row, ids = a["x"], a["row_idx"], a["expert_idx"]
    return {
        "x_dtype": dtype(x),
        "x_dims": dims(x),
        "tokens": size(x, 0),
        "ids_dtype": dtype(ids),
        "ids_dims": dims(ids),
        "ids_tokens": size(ids, 0),
        "top_k": size(ids, 1),
        "row_dtype": dtype(row),
        "row_dims": dims(row),
        "row_tokens": size(row, 0),
        "row_top_k": size(row, 1),
        "active_num": a["active_num"],
    }


def expert_tokens(a: Arguments) -> dict[str, Any]:
    """``npu_moe_compute_expert_tokens``."""
    rows = a["sorted_expert_for_source_row"]
    return {
        "ids_dtype": dtype(rows),
        "ids_dims": dims(rows),
        "rows": size(rows, 0),
        "experts": a["num_expert"],
    }


def init_routing(a: Arguments) -> dict[str, Any]:
    x, ids, scale = a["x"], a["expert_idx"], a["scale"]
    # without tokens the shape of scale does not matter (op-plugin, test_npu_moe_init_routing_empty_tensor)
    shaped = None if isinstance(size(x, 0), int) and size(x, 0) == 0 else scale
    active_range = list(a["active_expert_range"] or [])
    names = (
        "active_num",
        "drop_pad_mode",
        "expert_tokens_num_type",
        "expert_tokens_num_flag",
        "quant_mode",
        "row_idx_type",
    )
    return {
        "x_dtype": dtype(x),
        "x_dims": dims(x),
        "tokens": size(x, 0),
        "hidden": size(x, 1),
        "ids_dtype": dtype(ids),
        "ids_dims": dims(ids),
        "ids_tokens": size(ids, 0),
        "top_k": size(ids, 1),
        "experts": a["expert_num"],
        "range_length": len(active_range),
        "expert_start": active_range[0] if active_range else 0,
        "expert_end": active_range[-1] if active_range else a["expert_num"],
        "scale_dtype": dtype(scale),
        "scale_dims": dims(shaped),
        "scale_rows": size(shaped, 0),
        "scale_width": size(shaped, 1),
        "has_offset": a["offset"] is not None,
        **{name: a[name] for name in names},
    }


def unpermute(a: Arguments) -> dict[str, Any]:
    x, indices, probs = a["permuted_tokens"], a["sorted_indices"], a["probs"]
    return {
        "x_dtype": dtype(x),
        "x_dims": dims(x),
        "rows": size(x, 0),
        "hidden": size(x, 1),
        "indices_dtype": dtype(indices),
        "indices_dims": dims(indices),
        "indices_length": size(indices, 0),
        "weights_dtype": dtype(probs),
        "weights_dims": dims(probs),
        "tokens": size(probs, 0) if probs is not None else size(indices, 0),
        "top_k": size(probs, 1) if probs is not None else 1,
        "padded_mode": a["padded_mode"],
    }


def permute(a: Arguments) -> dict[str, Any]:
    """``npu_moe_token_permute``."""
    x, ids = a["tokens"], a["indices"]
    return {
        "x_dtype": dtype(x),
        "x_dims": dims(x),
        "tokens": size(x, 0),
        "hidden": size(x, 1),
        "ids_dtype": dtype(ids),
        "ids_dims": dims(ids),
        "ids_tokens": size(ids, 0),
        "top_k": size(ids, 1) if dims(ids) == 2 else 1,
        "padded_mode": a["padded_mode"],
    }


def re_routing(a: Arguments) -> dict[str, Any]:
    """``npu_moe_re_routing``: ``counts`` is the table of rows by source rank and local expert."""
    x, counts, scales = a["tokens"], a["expert_token_num_per_rank"], a["per_token_scales"]
    return {
        "x_dtype": dtype(x),
        "x_dims": dims(x),
        "rows": size(x, 0),
        "hidden": size(x, 1),
        "counts_dtype": dtype(counts),
        "counts_dims": dims(counts),
        "scale_dtype": dtype(scales),
        "scale_dims": dims(scales),
        "scale_rows": size(scales, 0),
        "expert_token_num_type": a["expert_token_num_type"],
        "idx_type": a["idx_type"],
    }


def finalize_routing(a: Arguments) -> dict[str, Any]:
    """``npu_moe_finalize_routing``; ``index`` is the row of each slot (``expanded_src_to_dst_row``)."""
    x, scales, index, bias = a["expanded_permuted_rows"], a["scales"], a["expanded_src_to_dst_row"], a["bias"]
    k = 1 if a["k"] is None else a["k"]
    top_k = size(scales, 1) if scales is not None else k
    return {
        "x_dtype": dtype(x),
        "x_dims": dims(x),
        "rows": size(x, 0),
        "hidden": size(x, -1),
        "index_dtype": dtype(index),
        "index_dims": dims(index),
        "index_length": size(index, 0),
        "tokens": size(scales, 0),
        "top_k": top_k,
        "fixed_k": top_k if isinstance(top_k, int) else None,
        "k": k,
        "has_weights": scales is not None,
        "weights_dtype": dtype(scales),
        "weights_dims": dims(scales),
        "has_bias": bias is not None,
        "bias_dtype": dtype(bias),
        "has_experts": a["export_for_source_row"] is not None,
        "experts_dtype": dtype(a["export_for_source_row"]),
        "skip1_dtype": dtype(a["skip1"]),
        "skip2_dtype": dtype(a["skip2"]),
        "has_skip1": a["skip1"] is not None,
        "has_skip2": a["skip2"] is not None,
        "drop_pad_mode": 0 if a["drop_pad_mode"] is None else a["drop_pad_mode"],
    }


READERS = {
    "npu_moe_gating_top_k": gating,
    "npu_moe_gating_top_k_softmax": gating_softmax,
    "npu_moe_gating_top_k_softmax_v2": gating_softmax,
    "npu_moe_init_routing": init_routing_v1,
    "npu_moe_compute_expert_tokens": expert_tokens,
    "npu_moe_init_routing_v2": init_routing,
    "npu_moe_token_permute": permute,
    "npu_moe_token_unpermute": unpermute,
    "npu_moe_re_routing": re_routing,
    "npu_moe_finalize_routing": finalize_routing,
}
