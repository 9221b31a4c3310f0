"""Shapes and dtypes of what Ascend operators and collectives give, where torch_npu or a process group is not there to ask: for
counting, never for a real graph.

A test compares each with torch's and torch_npu's own meta functions. Only calls that the implementations emit are described.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from moe_lowering.lookup import look_up

Described = tuple[tuple[int, ...], torch.dtype]
Given = Mapping[str, Any]
_DTYPES = {3: torch.int32, 5: torch.float16, 6: torch.float32, 15: torch.bfloat16}  # of output_dtype
_INT8, _INT32, _INT64, _FLOAT = torch.int8, torch.int32, torch.int64, torch.float32


def _init_routing(operands: Given) -> list[Described]:
    x, ids = operands["x"], operands["expert_idx"]
    slots = ids.shape[0] * ids.shape[1]
    first, end = operands["active_expert_range"]
    dtype = x.dtype if operands["quant_mode"] == -1 else _INT8
    return [((slots, x.shape[1]), dtype), ((slots,), _INT32), ((end - first,), _INT64), ((slots,), _FLOAT)]


def _unpermute(operands: Given) -> list[Described]:
    rows, weights = operands["permuted_tokens"], operands["probs"]
    return [((operands["sorted_indices"].shape[0] // weights.shape[1], rows.shape[1]), rows.dtype)]


def _finalize(operands: Given) -> list[Described]:
    rows, weights = operands["expanded_permuted_rows"], operands["scales"]
    return [((weights.shape[0], rows.shape[-1]), rows.dtype)]


def _grouped_matmul(operands: Given) -> list[Described]:
    x, weight = operands["x"][0], operands["weight"][0]
    wide = weight.shape[-1] * (8 if weight.dtype == _INT32 else 1)
    dtype = x.dtype if operands["output_dtype"] is None else _DTYPES[operands["output_dtype"]]
    return [((x.shape[0], wide), dtype)]


def _halved(name: str) -> Callable[[Given], list[Described]]:
    return lambda operands: [((operands[name].shape[0], operands[name].shape[1] // 2), operands[name].dtype)]


def _dynamic_quant(operands: Given) -> list[Described]:
    x = operands["input"]
    return [(tuple(x.shape), _INT8), (tuple(x.shape[:-1]), _FLOAT)]


def _swiglu_quant(operands: Given) -> list[Described]:
    rows, wide = operands["x"].shape[0], operands["weight_scale"][0].shape[-1]
    return [((rows, wide // 2), _INT8), ((rows,), _FLOAT)]


def _halved_to_int8(operands: Given) -> list[Described]:
    rows, wide = operands["x"].shape
    return [((rows, wide // 2), _INT8), ((rows,), _FLOAT)]


def _dispatch(operands: Given) -> list[Described]:
    """Of a rank with routed experts."""
    x, ids, ranks = operands["x"], operands["expert_ids"], operands["ep_world_size"]
    tokens, top_k = ids.shape
    local = operands["moe_expert_num"] // (ranks - operands["shared_expert_rank_num"])
    everyone = operands["global_bs"] or tokens * ranks
    rows = everyone * min(local, top_k)
    received, expand = ranks * local, 0
    if operands["expert_scales"] is not None:
        received, expand = received + everyone * 2 * top_k * (ranks // 8), rows
    return [
        ((rows * max(1, operands["tp_world_size"]), x.shape[1]), _INT8 if operands["quant_mode"] else x.dtype),
        ((rows,), _FLOAT),
        ((max(tokens * top_k, rows * 128),), _INT32),
        ((local,), _INT64),
        ((received,), _INT32),
        ((operands["tp_world_size"],), _INT32),
        ((expand,), _FLOAT),
    ]


def _combine(operands: Given) -> list[Described]:
    return [((operands["expert_ids"].shape[0], operands["expand_x"].shape[1]), operands["expand_x"].dtype)]


def _fused(operands: Given) -> list[Described]:
    weights = operands["w13"]
    local = weights[0].shape[0] if len(weights) == 1 and weights[0].dim() == 3 else len(weights)
    return [(tuple(operands["x"].shape), operands["x"].dtype), ((local,), _INT32)]


RESULTS: dict[str, Callable[[Given], list[Described]]] = {
    "npu_moe_init_routing_v2": _init_routing,
    "npu_moe_token_unpermute": _unpermute,
    "npu_moe_finalize_routing": _finalize,
    "npu_grouped_matmul": _grouped_matmul,
    "npu_swiglu": _halved("input"),
    "npu_clipped_swiglu": _halved("x"),
    "npu_dynamic_quant": _dynamic_quant,
    "npu_grouped_matmul_swiglu_quant_v2": _swiglu_quant,
    "npu_dequant_swiglu_quant": _halved_to_int8,
    "npu_swiglu_quant": _halved_to_int8,
    "npu_swiglu_clip_quant": _halved_to_int8,
    "npu_moe_distribute_dispatch_v2": _dispatch,
    "npu_moe_distribute_combine_v2": _combine,
    "dispatch_ffn_combine": _fused,
    "mega_moe": _fused,
    "dispatch_gmm_combine_decode": _fused,
}
IN_A_LIST = frozenset({"npu_grouped_matmul"})  # their only result is the only one of a list


def collective_result(name: str, x: torch.Tensor, *args: Any) -> torch.Tensor:
    """Of a functional collective on ``x``, with the arguments that follow it."""
    if name == "wait_tensor":
        return x
    lines = {
        "all_gather_into_tensor": lambda: x.shape[0] * args[0],
        "reduce_scatter_tensor": lambda: x.shape[0] // args[1],
        "all_to_all_single": lambda: sum(args[0]),
    }
    return x.new_empty((look_up(lines, name, "count: collective")(), *x.shape[1:]))
