"""Readers (``limits/calls``) of the operators that communicate: MC2, collectives, collectives fused with a grouped matmul."""

from __future__ import annotations

from typing import Any

from moe_lowering.limits.calls.tensors import Arguments, data_dependent, dims, dtype, product, size, total

_MC2_INTS = (
    "tp_world_size", "expert_shard_type", "shared_expert_num", "shared_expert_rank_num", "global_bs", "comm_alg",
    "copy_expert_num", "const_expert_num",
)  # fmt: skip


def _mc2(a: Arguments, tokens: Any) -> dict[str, Any]:
    """What dispatch and combine share. ``max_tokens`` is ``global_bs // ep_size``, or this rank's own tokens when
    ``global_bs`` is 0, which says that all ranks have the same number."""
    ep_size, global_bs = a["ep_world_size"], a["global_bs"]
    ids, weights, mask = a["expert_ids"], a["expert_scales"], a["x_active_mask"]
    moe_ranks = ep_size - a["shared_expert_rank_num"]
    return {
        "tokens": tokens,
        "max_tokens": global_bs // ep_size if global_bs and ep_size > 0 else tokens,
        "ids_dtype": dtype(ids),
        "ids_dims": dims(ids),
        "ids_tokens": size(ids, 0),
        "top_k": size(ids, 1),
        "experts": a["moe_expert_num"],
        "local_experts": a["moe_expert_num"] // moe_ranks if moe_ranks > 0 else None,
        "ep_size": ep_size,
        "ep_rank": a["ep_rank_id"],
        "group_length": len(a["group_ep"]),
        "group_tp_is_group_ep": a["group_tp"] == a["group_ep"],
        "has_weights": weights is not None,
        "weights_dtype": dtype(weights),
        "weights_dims": dims(weights),
        "weights_tokens": size(weights, 0),
        "weights_top_k": size(weights, 1),
        "has_mask": mask is not None,
        "mask_dtype": dtype(mask),
        "mask_dims": dims(mask),
        "mask_tokens": size(mask, 0),
        "has_elastic_info": a["elastic_info"] is not None,
        "has_performance_info": a["performance_info"] is not None,
        "special_experts": a["zero_expert_num"] + a["copy_expert_num"] + a["const_expert_num"],
        **{name: a[name] for name in _MC2_INTS},
    }


def dispatch(a: Arguments) -> dict[str, Any]:
    x, scales = a["x"], a["scales"]
    return {
        **_mc2(a, size(x, 0)),
        "x_dtype": dtype(x),
        "x_dims": dims(x),
        "hidden": size(x, 1),
        "quant_mode": a["quant_mode"],
        "expert_token_nums_type": a["expert_token_nums_type"],
        "has_scales": scales is not None,
        "scales_dtype": dtype(scales),
        "scales_dims": dims(scales),
        "scales_rows": size(scales, 0),
        "scales_width": size(scales, 1),
    }


def combine(a: Arguments) -> dict[str, Any]:
    x, assist, counts = a["expand_x"], a["assist_info_for_combine"], a["ep_send_counts"]
    return {
        **_mc2(a, size(a["expert_ids"], 0)),
        "x_dtype": dtype(x),
        "x_dims": dims(x),
        "rows": size(x, 0),
        "hidden": size(x, 1),
        "assist_dtype": dtype(assist),
        "assist_dims": dims(assist),
        "assist_length": size(assist, 0),
        "counts_dtype": dtype(counts),
        "counts_dims": dims(counts),
        "counts_length": size(counts, 0),
        "comm_quant_mode": a["comm_quant_mode"],
        "has_expand_scales": a["expand_scales"] is not None,
        "has_shared_expert_x": a["shared_expert_x"] is not None,
        "has_ori_x": a["ori_x"] is not None,
    }


def all_to_all_single(a: Arguments) -> dict[str, Any]:
    """PyTorch's collective: splits are rows."""
    x, send, receive = a["input"], a["input_split_sizes"], a["output_split_sizes"]
    return {
        "x_dims": dims(x),
        "send_total": total(send) if send else size(x, 0),
        "elements": size(x, 0),
        "send_length": len(send),
        "receive_length": len(receive),
        "data_dependent": data_dependent((*send, *receive)),
    }


def all_to_all_single_npu(a: Arguments) -> dict[str, Any]:
    """What torch_npu makes of it: counts and displacements are elements, one for each rank."""
    x, send, receive = a["input"], a["send_counts"], a["recv_counts"]
    return {
        "x_dims": dims(x),
        "send_total": total(send) if send else product(x.shape),
        "elements": product(x.shape),
        "send_length": len(send),
        "receive_length": len(receive),
        "displacements_length": len(a["send_displacements"]),
        "group_size": a["group_size"],
        "ranks_length": len(a["ranks"]),
        "data_dependent": data_dependent((*send, *receive)),
    }


def all_gather(a: Arguments) -> dict[str, Any]:
    """PyTorch's ``all_gather_into_tensor``."""
    return {"x_dims": dims(a["input"]), "rows": size(a["input"], 0), "group_size": a["group_size"]}


def reduce_scatter(a: Arguments) -> dict[str, Any]:
    """PyTorch's ``reduce_scatter_tensor``."""
    return {**all_gather(a), "x_dtype": dtype(a["input"]), "reduce_op": a["reduce_op"]}


def alltoallv_matmul(a: Arguments) -> dict[str, Any]:
    """``npu_alltoallv_gmm`` and ``npu_gmm_alltoallv``: their counts are lists of the host."""
    x, weight = a["gmm_x"], a["gmm_weight"]
    return {
        "x_dtype": dtype(x),
        "x_dims": dims(x),
        "rows": size(x, 0),
        "hidden": size(x, 1),
        "weight_dtype": dtype(weight),
        "weight_dims": dims(weight),
        "local_experts": size(weight, 0),
        "n": size(weight, 1 if a["trans_gmm_weight"] else 2),
        "ep_size": a["ep_world_size"],
        "group_length": len(a["hcom"]),
        "host_counts": True,
        "send_length": len(a["send_counts"]),
        "receive_length": len(a["recv_counts"]),
        "has_counts_tensor": a["send_counts_tensor"] is not None or a["recv_counts_tensor"] is not None,
    }


READERS = {
    "npu_moe_distribute_dispatch_v2": dispatch,
    "npu_moe_distribute_combine_v2": combine,
    "all_to_all_single": all_to_all_single,
    "all_to_all_single_npu": all_to_all_single_npu,
    "all_gather_into_tensor": all_gather,
    "reduce_scatter_tensor": reduce_scatter,
    "npu_alltoallv_gmm": alltoallv_matmul,
    "npu_gmm_alltoallv": alltoallv_matmul,
}
