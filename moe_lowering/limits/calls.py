"""From a call of an Ascend operator to the named quantities that its limits read, and the check of the call.

The words are the same for every operator, so that the pass can give them for a block that is not a call yet:
``tokens`` and ``max_tokens`` (of one rank, and the largest of any rank), ``hidden``, ``intermediate``, ``top_k``,
``experts`` (of all ranks), ``local_experts``, ``ep_size``, ``<tensor>_dtype`` as in ``"bfloat16"``, ``<tensor>_dims``.
Only shapes, strides and dtypes are read: tensors may be real, fake or symbolic. No guard is added.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from moe_lowering.limits.prover import Prover
from moe_lowering.limits.table import Violation, check

Arguments = Mapping[str, Any]


def _dtype(tensor: Any) -> str | None:
    """``"bfloat16"`` for torch.bfloat16; None for no tensor."""
    return None if tensor is None else str(tensor.dtype).removeprefix("torch.")


def _dims(tensor: Any) -> int | None:
    return None if tensor is None else len(tensor.shape)


def _size(tensor: Any, axis: int) -> Any:
    """The size of one axis; None when there is no tensor or no such axis."""
    if tensor is None or not -len(tensor.shape) <= axis < len(tensor.shape):
        return None
    return tensor.shape[axis]


def _product(sizes: Sequence[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def _contiguous(tensor: Any) -> bool | None:
    """Whether the tensor is contiguous; None when a symbolic size keeps that from being known without a guard."""
    if any(not isinstance(n, int) for n in (*tensor.shape, *tensor.stride())):
        return None
    return bool(tensor.is_contiguous())


def _gating(a: Arguments) -> dict[str, Any]:
    x, bias = a["x"], a["bias"]
    return {
        "x_dtype": _dtype(x),
        "x_dims": _dims(x),
        "tokens": _size(x, 0),
        "experts": _size(x, 1),
        "top_k": a["k"],
        "bias_dtype": _dtype(bias),
        "bias_dims": _dims(bias),
        "bias_length": _size(bias, 0),
        "has_hash": a["input_ids"] is not None or a["tid2eid"] is not None,
        **{name: a[name] for name in ("k_group", "group_count", "group_select_mode", "renorm", "norm_type")},
    }


def _init_routing(a: Arguments) -> dict[str, Any]:
    x, ids, scale = a["x"], a["expert_idx"], a["scale"]
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
        "x_dtype": _dtype(x),
        "x_dims": _dims(x),
        "tokens": _size(x, 0),
        "hidden": _size(x, 1),
        "ids_dtype": _dtype(ids),
        "ids_dims": _dims(ids),
        "ids_tokens": _size(ids, 0),
        "top_k": _size(ids, 1),
        "experts": a["expert_num"],
        "range_length": len(active_range),
        "expert_start": active_range[0] if active_range else 0,
        "expert_end": active_range[-1] if active_range else a["expert_num"],
        "scale_dtype": _dtype(scale),
        "scale_dims": _dims(scale),
        "scale_rows": _size(scale, 0),
        "scale_width": _size(scale, 1),
        "has_offset": a["offset"] is not None,
        **{name: a[name] for name in names},
    }


def _unpermute(a: Arguments) -> dict[str, Any]:
    x, indices, probs = a["permuted_tokens"], a["sorted_indices"], a["probs"]
    return {
        "x_dtype": _dtype(x),
        "x_dims": _dims(x),
        "rows": _size(x, 0),
        "hidden": _size(x, 1),
        "indices_dtype": _dtype(indices),
        "indices_dims": _dims(indices),
        "indices_length": _size(indices, 0),
        "weights_dtype": _dtype(probs),
        "weights_dims": _dims(probs),
        "tokens": _size(probs, 0) if probs is not None else _size(indices, 0),
        "top_k": _size(probs, 1) if probs is not None else 1,
        "padded_mode": a["padded_mode"],
        "has_restore_shape": a["restore_shape"] is not None,
    }


_GMM_SCALES = ("scale", "offset", "antiquant_scale", "antiquant_offset", "per_token_scale")
_GMM_RESERVED = ("activation_input", "activation_quant_scale", "activation_quant_offset")


def _grouped_matmul(a: Arguments) -> dict[str, Any]:
    """Names: ``k`` and ``n`` of the first weight, ``hidden`` the inner size of x, ``groups`` the number of groups."""
    x, weight, bias = a["x"], a["weight"], a["bias"] or None
    single = len(weight) == 1 and _dims(weight[0]) == 3
    first = weight[0] if weight else None
    group_list = a["group_list"] if isinstance(a["group_list"], torch.Tensor) else None
    dtypes = {_dtype(t) for t in (*x, *weight)}
    floating = all(t.is_floating_point() for t in (*x, *weight))
    return {
        "x_dtype": _dtype(x[0]) if x else None,
        "x_dims": _dims(x[0]) if x else None,
        "x_count": len(x),
        "rows": _size(x[0], 0) if x else None,
        "hidden": _size(x[0], -1) if x else None,
        "weight_dtype": next(iter(dtypes)) if len(dtypes) == 1 else "+".join(sorted(map(str, dtypes))),
        "weight_dims": _dims(first),
        "weight_count": len(weight),
        "weights_alike": len({(_dims(w), str(_size(w, -2)), str(_size(w, -1))) for w in weight}) <= 1,
        "single_weight": single,
        "k": _size(first, -2),
        "n": _size(first, -1),
        "groups": _size(first, 0) if single else len(weight),
        "bias_dtype": _dtype(bias[0]) if bias else None,
        "bias_count": len(bias) if bias else None,
        "bias_groups": _size(bias[0], 0) if bias and _dims(bias[0]) == 2 else None,
        "bias_width": _size(bias[0], -1) if bias else None,
        "bias_dims": _dims(bias[0]) if bias else None,
        "quantised": not floating or any(a.get(name) for name in _GMM_SCALES),
        "has_reserved": any(a.get(name) for name in _GMM_RESERVED),
        "has_group_list": a["group_list"] is not None,
        "group_list_dtype": _dtype(group_list),
        "group_list_dims": _dims(group_list),
        "group_list_length": _size(group_list, 0),
        "group_type": "None" if a["group_type"] is None else a["group_type"],  # None is refused, not "not given"
        "group_list_type": a["group_list_type"],
        "split_item": a["split_item"],
        "act_type": a["act_type"],
    }


def _gated(x: Any, dim: int) -> dict[str, Any]:
    """Quantities of an operator that halves axis ``dim`` of x; ``intermediate`` is the halved size."""
    width = _size(x, dim)
    axis = None if width is None else dim % len(x.shape)
    return {
        "x_dtype": _dtype(x),
        "x_dims": _dims(x),
        "dim": dim,
        "width": width,
        "intermediate": None if width is None else width // 2,
        "rows": None if axis is None else _product([n for i, n in enumerate(x.shape) if i != axis]),
    }


def _swiglu(a: Arguments) -> dict[str, Any]:
    return _gated(a["input"], a["dim"])


def _clipped_swiglu(a: Arguments) -> dict[str, Any]:
    group_index = a["group_index"]
    return {
        **_gated(a["x"], a["dim"]),
        "contiguous": _contiguous(a["x"]),
        "group_index_dtype": _dtype(group_index),
        "group_index_dims": _dims(group_index),
    }


_MC2_INTS = (
    "tp_world_size", "expert_shard_type", "shared_expert_num", "shared_expert_rank_num", "global_bs", "comm_alg",
    "const_expert_num",
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
        "ids_dtype": _dtype(ids),
        "ids_dims": _dims(ids),
        "ids_tokens": _size(ids, 0),
        "top_k": _size(ids, 1),
        "experts": a["moe_expert_num"],
        "local_experts": a["moe_expert_num"] // moe_ranks if moe_ranks > 0 else None,
        "ep_size": ep_size,
        "ep_rank": a["ep_rank_id"],
        "group_length": len(a["group_ep"]),
        "has_weights": weights is not None,
        "weights_dtype": _dtype(weights),
        "weights_dims": _dims(weights),
        "weights_tokens": _size(weights, 0),
        "weights_top_k": _size(weights, 1),
        "has_mask": mask is not None,
        "mask_dtype": _dtype(mask),
        "mask_dims": _dims(mask),
        "mask_tokens": _size(mask, 0),
        "has_elastic_info": a["elastic_info"] is not None,
        "has_performance_info": a["performance_info"] is not None,
        "special_experts": a["zero_expert_num"] + a["copy_expert_num"] + a["const_expert_num"],
        **{name: a[name] for name in _MC2_INTS},
    }


def _dispatch(a: Arguments) -> dict[str, Any]:
    x, scales = a["x"], a["scales"]
    return {
        **_mc2(a, _size(x, 0)),
        "x_dtype": _dtype(x),
        "x_dims": _dims(x),
        "hidden": _size(x, 1),
        "quant_mode": a["quant_mode"],
        "expert_token_nums_type": a["expert_token_nums_type"],
        "has_scales": scales is not None,
        "scales_dtype": _dtype(scales),
        "scales_dims": _dims(scales),
        "scales_rows": _size(scales, 0),
        "scales_width": _size(scales, 1),
    }


def _combine(a: Arguments) -> dict[str, Any]:
    x, assist, counts = a["expand_x"], a["assist_info_for_combine"], a["ep_send_counts"]
    return {
        **_mc2(a, _size(a["expert_ids"], 0)),
        "x_dtype": _dtype(x),
        "x_dims": _dims(x),
        "rows": _size(x, 0),
        "hidden": _size(x, 1),
        "assist_dtype": _dtype(assist),
        "assist_dims": _dims(assist),
        "assist_length": _size(assist, 0),
        "counts_dtype": _dtype(counts),
        "counts_dims": _dims(counts),
        "counts_length": _size(counts, 0),
        "comm_quant_mode": a["comm_quant_mode"],
        "has_expand_scales": a["expand_scales"] is not None,
        "has_shared_expert_x": a["shared_expert_x"] is not None,
        "has_ori_x": a["ori_x"] is not None,
    }


def _dispatch_ffn_combine(a: Arguments) -> dict[str, Any]:
    """moe_lowering's functional wrapper of the 16-bit variant."""
    x, ids, weights, w13, w2 = a["x"], a["ids"], a["weights"], a["w13"], a["w2"]
    stacked = len(w13) == 1 and _dims(w13[0]) == 3
    local_experts = _size(w13[0], 0) if stacked else len(w13)
    dtypes = {_dtype(t) for t in (*w13, *w2)}
    return {
        "x_dtype": _dtype(x),
        "x_dims": _dims(x),
        "tokens": _size(x, 0),
        "max_tokens": _size(x, 0),
        "hidden": _size(x, 1),
        "intermediate": _size(w2[0], -2),
        "weight_dtype": next(iter(dtypes)) if len(dtypes) == 1 else "+".join(sorted(map(str, dtypes))),
        "weights_contiguous": all(_contiguous(w) for w in (*w13, *w2)),
        "ids_dtype": _dtype(ids),
        "ids_tokens": _size(ids, 0),
        "top_k": _size(ids, 1),
        "weights_dtype": _dtype(weights),
        "local_experts": local_experts,
        "experts": local_experts * a["ep_size"],
        "ep_size": a["ep_size"],
        "group_length": len(a["group"]),
        "max_output_size": a["max_output_size"],
    }


_READERS: dict[str, Callable[[Arguments], dict[str, Any]]] = {
    "npu_moe_gating_top_k": _gating,
    "npu_moe_init_routing_v2": _init_routing,
    "npu_moe_token_unpermute": _unpermute,
    "npu_grouped_matmul": _grouped_matmul,
    "npu_swiglu": _swiglu,
    "npu_clipped_swiglu": _clipped_swiglu,
    "npu_moe_distribute_dispatch_v2": _dispatch,
    "npu_moe_distribute_combine_v2": _combine,
    "dispatch_ffn_combine": _dispatch_ffn_combine,
}
OPERATORS = frozenset(_READERS)


def quantities(op_name: str, arguments: Arguments) -> dict[str, Any]:
    """The named quantities of one call. What a call does not have (no bias, a missing axis) is None.

    Args:
        op_name: one of ``OPERATORS``, without namespace.
        arguments: every argument of the schema by name, defaults included, as ``bind`` gives them.
    """
    return _READERS[op_name](arguments)


_REQUIRED = object()


@functools.lru_cache(maxsize=256)
def _parameters(op: torch._ops.OpOverload) -> tuple[tuple[str, bool, Any], ...]:
    """(name, keyword only, default or _REQUIRED) of each argument; reading them from the schema is slow."""
    return tuple(
        (a.name, a.kwarg_only, a.default_value if a.has_default_value() else _REQUIRED) for a in op._schema.arguments
    )


def bind(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument of the schema by name: given, or its default.

    Raises:
        TypeError: when an argument is missing, unknown or given twice.
    """
    bound: dict[str, Any] = {}
    rest = dict(kwargs)
    for position, (name, keyword_only, default) in enumerate(_parameters(op)):
        if position < len(args) and not keyword_only:
            bound[name] = args[position]
            if name in rest:
                raise TypeError(f"{op}: {name} is given twice")
        elif name in rest:
            bound[name] = rest.pop(name)
        elif default is not _REQUIRED:
            bound[name] = default
        else:
            raise TypeError(f"{op}: {name} is missing")
    positional = sum(not keyword_only for _, keyword_only, _ in _parameters(op))
    if rest or len(args) > positional:
        raise TypeError(f"{op}: unknown arguments {sorted(rest) or len(args)}")
    return bound


def _varying_ints(name: str, arguments: Arguments) -> list[Violation]:
    """Plain-int arguments that receive a symbolic size: the schema would fix it at its present value."""
    return [
        Violation(
            code="call.symbolic_int",
            operator=name,
            value=str(value),
            limit="a Python int",
            source="torch_npu 2.13.0 schemas: these arguments are int, not SymInt",
            message=f"{name}: {argument} is {value}, which varies; accepted: a Python int",
            advice="pass 0 or -1 where the operator documents it as 'all', or give the bound",
        )
        for argument, given in arguments.items()
        for value in (given if isinstance(given, (list, tuple)) else (given,))
        if isinstance(value, torch.SymInt)
    ]


def check_call(
    op: torch._ops.OpOverload,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    soc: str,
    extra: Mapping[str, Any] | None = None,
    prover: Prover | None = None,
) -> list[Violation]:
    """Every rule that a call of an Ascend operator breaks; empty for operators that have no limit tables.

    Args:
        op: the overload, e.g. ``torch.ops.npu.npu_swiglu.default``.
        args, kwargs: as in the call; real, fake or symbolic tensors.
        soc: the SoC whose rows apply.
        extra: quantities that a call does not show, e.g. ``buffer_bytes``.
        prover: see ``check``.
    """
    name = op._schema.name.rpartition("::")[2]
    if name not in OPERATORS:
        return []
    arguments = bind(op, args, kwargs)
    varying = _varying_ints(name, arguments)
    if varying:
        return varying
    return check(name, soc, {**quantities(name, arguments), **(extra or {})}, prover)
