"""The schemas of the operators that the pass emits, as text, so that a block can be judged where torch_npu is not loaded.

They complete and split the arguments of a call as torch would. The texts are those of torch_npu 2.13.0; a test compares each
with the operator; those of ``LIBRARIES`` are the library's own. Schemas of our own operators are asked of torch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

# Namespaces of torch's and torch_npu's collectives
COLLECTIVES = ("_c10d_functional", "c10d_functional", "c10d", "npu_define")
# One text each
_SCHEMAS = (
    "npu_moe_init_routing_v2(Tensor x, Tensor expert_idx, *, Tensor? scale=None, Tensor? offset=None, int active_num=-1, "
    "int expert_capacity=-1, int expert_num=-1, int drop_pad_mode=0, int expert_tokens_num_type=0, "
    "bool expert_tokens_num_flag=False, int quant_mode=-1, int[2] active_expert_range=[], int row_idx_type=0, "
    "int? x_dtype=None) -> (Tensor, Tensor, Tensor, Tensor)",
    "npu_moe_token_unpermute(Tensor permuted_tokens, Tensor sorted_indices, Tensor? probs=None, bool padded_mode=False, "
    "int[]? restore_shape=None) -> Tensor",
    "npu_moe_finalize_routing(Tensor expanded_permuted_rows, Tensor? skip1, Tensor? skip2, Tensor? bias, Tensor? scales, "
    "Tensor expanded_src_to_dst_row, Tensor? export_for_source_row, int? drop_pad_mode=0, int? k=1) -> Tensor",
    "npu_grouped_matmul(Tensor[] x, Tensor[] weight, *, Tensor[]? bias=None, Tensor[]? scale=None, Tensor[]? offset=None, "
    "Tensor[]? antiquant_scale=None, Tensor[]? antiquant_offset=None, Tensor[]? per_token_scale=None, "
    "Tensor? group_list=None, Tensor[]? activation_input=None, Tensor[]? activation_quant_scale=None, "
    "Tensor[]? activation_quant_offset=None, int? split_item=0, int? group_type=None, int? group_list_type=0, "
    "int? act_type=0, int[]? tuning_config=None, int? output_dtype=None, int? x_dtype=None, int? weight_dtype=None, "
    "int? scale_dtype=None, int? per_token_scale_dtype=None) -> Tensor[]",
    "npu_swiglu(Tensor input, int dim=-1) -> Tensor",
    "npu_swiglu_quant(Tensor x, *, Tensor? smooth_scales=None, Tensor? offsets=None, Tensor? group_index=None, "
    "bool activate_left=False, int quant_mode=0, int group_list_type=0, ScalarType? dst_type=None) -> (Tensor, Tensor)",
    "npu_swiglu_clip_quant(Tensor x, Tensor group_index, Tensor group_alpha, *, bool activate_left=False, int quant_mode=1, "
    "int clamp_mode=1) -> (Tensor, Tensor)",
    "npu_clipped_swiglu(Tensor x, *, Tensor? group_index=None, int dim=-1, float alpha=1.702, float limit=7., float bias=1., "
    "bool interleaved=True) -> Tensor",
    "npu_dynamic_quant(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, int? dst_type=None, "
    'str quant_mode="pertoken", float dst_type_max=0.) -> (Tensor, Tensor)',
    "npu_grouped_matmul_swiglu_quant_v2(Tensor x, Tensor[] weight, Tensor[] weight_scale, Tensor x_scale, "
    "Tensor group_list, *, Tensor? smooth_scale=None, Tensor[]? weight_assist_matrix=None, Tensor? bias=None, "
    "int? dequant_mode=0, int? dequant_dtype=6, int? quant_mode=0, int? quant_dtype=1, int? group_list_type=0, "
    "int[]? tuning_config=None, int? x_dtype=None, int? weight_dtype=None, int? weight_scale_dtype=None, "
    "int? x_scale_dtype=None) -> (Tensor, Tensor)",
    "npu_dequant_swiglu_quant(Tensor x, *, Tensor? weight_scale=None, Tensor? activation_scale=None, Tensor? bias=None, "
    "Tensor? quant_scale=None, Tensor? quant_offset=None, Tensor? group_index=None, bool activate_left=False, "
    "int quant_mode=0, int? dst_type=None, int? round_mode=None, int? activate_dim=None, int swiglu_mode=0, "
    "float clamp_limit=7., float glu_alpha=1.702, float glu_bias=1.) -> (Tensor, Tensor)",
    "npu_moe_distribute_dispatch_v2(Tensor x, Tensor expert_ids, str group_ep, int ep_world_size, int ep_rank_id, "
    "int moe_expert_num, *, Tensor? scales=None, Tensor? x_active_mask=None, Tensor? expert_scales=None, "
    'Tensor? elastic_info=None, Tensor? performance_info=None, str group_tp="", int tp_world_size=0, int tp_rank_id=0, '
    "int expert_shard_type=0, int shared_expert_num=1, int shared_expert_rank_num=0, int quant_mode=0, int global_bs=0, "
    'int expert_token_nums_type=1, str comm_alg="", int zero_expert_num=0, int copy_expert_num=0, int const_expert_num=0, '
    "int? y_dtype=None, int? x_dtype=None, int? scales_dtype=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "npu_moe_distribute_combine_v2(Tensor expand_x, Tensor expert_ids, Tensor assist_info_for_combine, "
    "Tensor ep_send_counts, Tensor expert_scales, str group_ep, int ep_world_size, int ep_rank_id, int moe_expert_num, *, "
    "Tensor? tp_send_counts=None, Tensor? x_active_mask=None, Tensor? expand_scales=None, Tensor? shared_expert_x=None, "
    "Tensor? elastic_info=None, Tensor? ori_x=None, Tensor? const_expert_alpha_1=None, "
    "Tensor? const_expert_alpha_2=None, Tensor? const_expert_v=None, Tensor? performance_info=None, "
    'str group_tp="", int tp_world_size=0, int tp_rank_id=0, int expert_shard_type=0, int shared_expert_num=1, '
    'int shared_expert_rank_num=0, int global_bs=0, int comm_quant_mode=0, str comm_alg="", int zero_expert_num=0, '
    "int copy_expert_num=0, int const_expert_num=0) -> Tensor",
)
_TEXTS = {text.partition("(")[0]: text for text in _SCHEMAS}
TEXTS: Mapping[str, str] = _TEXTS
# Operators of libraries that a model brings itself, and their namespaces. Source: recipes.swiglu_clip_quant
LIBRARIES: Mapping[str, str] = {"npu_swiglu_clip_quant": "custom"}


@functools.cache
def schema(operator: str) -> Any:
    """The schema of an operator that the pass emits, by its name without namespace.

    Raises:
        AttributeError: no such operator.
    """
    if operator in _TEXTS:
        return torch._C.parse_schema(f"{LIBRARIES.get(operator, 'npu')}::{_TEXTS[operator]}")
    return getattr(torch.ops.moe_lowering, operator).default._schema


def loaded_libraries() -> frozenset[str]:
    """Those operators of ``LIBRARIES`` that this process has, with the arguments that are known here."""
    return frozenset(name for name, library in LIBRARIES.items() if _is_loaded(library, name))


def _is_loaded(library: str, name: str) -> bool:
    found = getattr(getattr(getattr(torch.ops, library), name, None), "default", None)
    return found is not None and str(found._schema) == str(schema(name))


@functools.cache
def _arguments(operator: str) -> tuple[frozenset[str], Mapping[str, Any], Mapping[str, Any]]:
    """(names without a default, defaults of the others, what None means for those where it means something else)."""
    arguments = schema(operator).arguments
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    meant = {
        a.name: a.default_value
        for a in arguments
        if a.has_default_value() and a.default_value is not None and str(a.type).startswith("Optional")
    }
    return frozenset(a.name for a in arguments) - defaults.keys(), defaults, meant


def complete(operator: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument of the schema, those that are not given with their defaults, as ``bind`` gives them for a call.

    Raises:
        TypeError: an argument is missing or unknown.
    """
    required, defaults, meant = _arguments(operator)
    if missing := required - arguments.keys():
        raise TypeError(f"{operator}: missing arguments {sorted(missing)}")
    if unknown := arguments.keys() - required - defaults.keys():
        raise TypeError(f"{operator}: unknown arguments {sorted(unknown)}")
    bound = {**defaults, **arguments}
    bound.update({name: default for name, default in meant.items() if bound[name] is None})
    return bound


@functools.cache
def _positional(operator: str) -> tuple[str, ...]:
    """The arguments that are given by position. Our own operators declare no keyword-only arguments: of theirs, those
    without a default."""
    ours = operator not in _TEXTS
    return tuple(
        a.name for a in schema(operator).arguments if not a.kwarg_only and not (ours and a.has_default_value())
    )


def split(operator: str, arguments: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call as (positional, by name): positional are those before the first that is left out, as far
    as the schema allows."""
    rest, args = dict(arguments), []
    for name in _positional(operator):
        if name not in rest:
            break
        args.append(rest.pop(name))
    return tuple(args), rest
