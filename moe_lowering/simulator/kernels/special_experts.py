"""Experts past the routed ones, for which nothing is sent: what combine of MC2 adds for them.

Ids from moe_expert_num on are those of zero, then of copy, then of const experts: they give nothing, the token ``ori_x``
itself, and alpha_1 * ori_x + alpha_2 * v with lines of ``const_expert_alpha_1``, ``_2`` and ``const_expert_v``.
Meaning: op-plugin's documentation, aclnnMoeDistributeCombineV4. Computed in float32; where the operator rounds in between is
not documented.
"""

from __future__ import annotations

from typing import Any

import torch

KINDS = ("zero_expert_num", "copy_expert_num", "const_expert_num")
_OF_CONST = ("const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")


def special_experts(arguments: dict[str, Any]) -> int:
    """How many of all kinds a call has."""
    return int(sum(arguments[kind] for kind in KINDS))


def special_refusal(operator: str, arguments: dict[str, Any], rows: torch.Tensor) -> str:
    """What is wrong with the tensors that copy and const experts take, of a combine of ``rows`` [A, H]; "" for nothing."""
    tokens, hidden = len(arguments["expert_ids"]), rows.shape[-1]
    needed: dict[str, tuple[int, int]] = {}
    if arguments["copy_expert_num"] or arguments["const_expert_num"]:
        needed["ori_x"] = (tokens, hidden)
    if arguments["const_expert_num"]:
        needed |= dict.fromkeys(_OF_CONST, (arguments["const_expert_num"], hidden))
    for name, shape in needed.items():
        tensor = arguments[name]
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != rows.dtype:
            seen = None if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            return f"{operator}: {name} is {seen}; accepted: {rows.dtype} {shape}"
    return ""


def special_results(arguments: dict[str, Any], ids: torch.Tensor) -> list[torch.Tensor]:
    """For each k what the k-th choices give that are such experts, [T, H] float32, zero for others; [] without such experts."""
    if not special_experts(arguments):
        return []
    first = arguments["moe_expert_num"] + arguments["zero_expert_num"]
    last, x = first + arguments["copy_expert_num"], arguments["ori_x"]
    results = []
    for chosen in ids.long().unbind(1):
        total = torch.zeros(len(ids), 1)
        if last > first:
            total = torch.where(((chosen >= first) & (chosen < last)).unsqueeze(1), x.float(), 0.0)
        if arguments["const_expert_num"]:
            a, b, v = (arguments[name].float()[(chosen - last).clamp(min=0)] for name in _OF_CONST)
            total = total + torch.where((chosen >= last).unsqueeze(1), a * x.float() + b * v, 0.0)
        results.append(total)
    return results
