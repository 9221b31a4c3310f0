"""Which operators are a part of an MoE layer, by their names: torch_npu's, vllm-ascend's, vLLM's, transformers', torch's own.

Contract. A name is taken apart into words; a word that only MoE layers use makes it an MoE operator, whoever defines it, so
an operator of a torch_npu that is newer than this package is seen too. What the words would take wrongly, or miss, is a
row of a table with its reason. A test classifies every operator that the installed torch_npu registers.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.passes.graph.arguments import argument
from moe_lowering.passes.verifier import GENERIC

ROUTER = "router"
GROUPED_MM = "grouped_mm"
TORCH_NPU = "npu_operator"
OPAQUE = "opaque_operator"
NOT_TRACED = "not_traced"

_WORDS = frozenset({"moe", "expert", "experts", "gmm"})
_PHRASES = (
    "grouped_mm", "grouped_matmul", "grouped_gemm", "group_gemm", "dispatch_ffn", "ffn_combine", "ffn_to_attention",
    "attention_to_ffn", "ffn_worker", "moe_align", "fused_moe", "fused_marlin_moe",
)  # fmt: skip
# A router gives ids and weights; experts that take them are found by their own operators, or are generic ones.
_ROUTERS = ("gating_top_k", "topk_softmax", "topk_sigmoid", "group_topk", "grouped_topk", "moe_update_expert")
_ASCEND = ("npu", "_C_ascend", "atb", "custom", "moe_lowering")
# alltoall_experts is AllToAll with exact splits, which a model may call itself; capturing tells where it must not.
_HELPERS = frozenset({*GENERIC, "assert_tokens", "keep_alive", "alltoall_experts"})

# Operators whose names have such words and that are no MoE layer, or that only occur beside an operator that is known.
NOT_MOE = {
    "npu_group_norm_silu": "group normalisation",
    "npu_group_norm_swish": "group normalisation",
    "npu_group_norm_swish_grad": "group normalisation",
    "npu_group_quant": "quantises rows by expert, between operators that are named",
    "npu_swiglu_group_quant": "activation by expert, between two grouped matmuls",
    "npu_swiglu_group_quant_backward": "activation by expert, between two grouped matmuls",
}


@functools.lru_cache(maxsize=4096)
def kind_of(target: Any) -> str | None:
    """What kind of MoE operator a call_function target is; None for one of no interest.

    Args:
        target: an operator, or a function of a graph that AOTAutograd has not traced.
    """
    namespace, name = library_and_name(target)
    if namespace == "moe_lowering" and name in _HELPERS:
        traced = isinstance(target, torch._ops.OpOverload) or name not in GENERIC
        return None if traced else NOT_TRACED  # an OpOverloadPacket, which no pass after AOTAutograd meets
    if not isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)) and namespace != "torch":
        return None
    if name in NOT_MOE:
        return None
    if any(word in name for word in _ROUTERS):
        return ROUTER
    if namespace in ("aten", "torch", "transformers") and "grouped_mm" in name:
        return GROUPED_MM
    if name == "npu_ffn":
        return TORCH_NPU
    if _WORDS.isdisjoint(re.split(r"[_\d]+", name)) and not any(phrase in name for phrase in _PHRASES):
        return None
    return TORCH_NPU if namespace in _ASCEND or name.startswith("npu_") else OPAQUE


def library_and_name(target: Any) -> tuple[str, str]:
    """(namespace, name in lower case) of an operator or a function of torch's; ("", "") of anything else."""
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return namespace, name.lower()
    if isinstance(target, torch._ops.OpOverloadPacket):
        namespace, _, name = target._qualified_op_name.partition("::")
        return namespace, name.lower()
    module = str(getattr(target, "__module__", None) or "")
    if module.split(".")[0] in ("torch", "torch_npu"):
        return "torch", str(getattr(target, "__name__", "")).lower()
    return "", ""


def called_operators(node: Node) -> list[Any]:
    """The operators that a node calls: its target, and for a higher-order operator those among its arguments."""
    target = node.target
    if not isinstance(target, torch._ops.HigherOrderOperator):
        return [target]
    targets: list[Any] = [
        arg for arg in node.args if isinstance(arg, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
    ]
    return targets


def triton_kernel(node: Node) -> str:
    """The name of the Triton kernel that a node launches, in lower case; "" for other nodes."""
    index = node.kwargs.get("kernel_idx")
    if not isinstance(node.target, torch._ops.HigherOrderOperator) or not isinstance(index, int):
        return ""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    kernel: Any = kernel_side_table.id_to_kernel.get(index)
    return str(getattr(getattr(kernel, "fn", kernel), "__name__", "")).lower()


def is_moe_name(name: str) -> bool:
    """Whether a kernel's name, in lower case, has a word that only MoE layers use."""
    return not _WORDS.isdisjoint(re.split(r"[_\d]+", name)) or any(phrase in name for phrase in _PHRASES)


def is_moe_module(entry: Any) -> bool:
    """Whether an entry of a node's ``nn_module_stack``, (path, type), has a name that only MoE layers have."""
    path, kind = entry if isinstance(entry, (tuple, list)) and len(entry) == 2 else (entry, "")
    names = str(path).rpartition(".")[2], str(getattr(kind, "__name__", kind)).rpartition(".")[2]
    return any(word in name.lower() for name in names for word in ("moe", "expert"))


def is_used_for_experts(node: Node) -> bool:
    """Of an operator that dense layers may use too: whether this call has experts."""
    _, name = library_and_name(node.target)
    if name == "npu_ffn":  # a dense MLP unless it is told how many tokens each expert has
        return any(node.kwargs.get(key) is not None for key in ("expert_tokens", "expert_tokens_index"))
    if name == "_grouped_mm" and isinstance(node.target, torch._ops.OpOverload):  # without offsets: a batched product
        return argument(node, "offs") is not None
    return True
