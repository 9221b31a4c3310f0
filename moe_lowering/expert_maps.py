"""Comparison of an ``expert_map``, as vLLM has it, with the one placement of experts that the operators have."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from moe_lowering.deployment import Deployment, experts_of_rank


def rank_of(place: Deployment) -> tuple[int | None, int, int, str]:
    """The fields of a deployment that ``compare_map`` needs: dynamo of torch 2.10 passes no frozen dataclass to a
    function that it does not trace."""
    unknown = place.unknown_rank if place.ep_rank is None else ""
    return place.ep_rank, place.ep_size, place.shared_expert_ranks, unknown


@torch.compiler.assume_constant_result  # dynamo then calls it with the real tensor, instead of tracing it
def compare_map(
    expert_map: Tensor, num_experts: int, ep_rank: int | None, ep_size: int, shared_expert_ranks: int, unknown: str
) -> bool:
    """True, or a ValueError: every entry is what ``check_expert_map`` says. Of a fake or meta tensor shape and dtype alone."""
    if (
        expert_map.dim() != 1
        or expert_map.shape[0] != num_experts
        or expert_map.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"moe_experts: expert_map is {expert_map.dtype} of shape {list(expert_map.shape)}; accepted: int32 or int64 "
            f"[{num_experts}], one for each expert of all ranks"
        )
    if expert_map.is_meta or isinstance(expert_map, FakeTensor):
        return True
    if ep_rank is None:
        raise ValueError(unknown)
    own = experts_of_rank(num_experts, ep_rank, ep_size, shared_expert_ranks)
    local = num_experts // (ep_size - shared_expert_ranks)
    rank = f"(r - {shared_expert_ranks})" if shared_expert_ranks else "r"
    following = "(r + 1)" if rank == "r" else f"(r - {shared_expert_ranks} + 1)"
    for expert, index in enumerate(expert_map.tolist()):
        expected = expert - own.start if own.start <= expert < own.stop else -1
        if index != expected:
            raise ValueError(
                f"moe_experts: expert_map has {index} for expert {expert} on EP rank {ep_rank}; accepted: {expected}, as "
                f"rank r holds experts {rank} * {local} to {following} * {local} - 1. For another placement use log2phy "
                "(log2phy_from_expert_maps makes it)"
            )
    return True
