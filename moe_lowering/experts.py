"""Two changes of how a model's experts are stored, for users: their placement on ranks, and their number of tensors.

``log2phy_from_expert_maps`` turns the expert maps of all ranks into one ``log2phy``; ``list_experts`` splits stacked weights
into a tensor for each expert, which ``mega_moe`` wants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_lowering.argument_checks import require_instance, require_integer
from moe_lowering.layers.expert_modules import (
    SUFFIXES,
    moe_modules,
    refuse_computed,
    warn_of_other_implementations,
    weight_names,
)
from moe_lowering.layers.moe import MoE

__all__ = ["list_experts", "log2phy_from_expert_maps"]


def log2phy_from_expert_maps(expert_maps: Sequence[Tensor], *, shared_expert_ranks: int = 0) -> tuple[Tensor, int]:
    """The ``log2phy`` of a placement that vLLM's expert maps describe, for ``moe_experts(log2phy=..., num_experts=...)``.

    The operators hold experts in blocks: rank r has the physical experts [r * E_local, (r + 1) * E_local), slot by slot. A
    map that places logical experts otherwise (round robin, or by load, with redundant copies) is a choice of physical
    experts for logical ones, so weights stay where the map says: the expert of slot s of rank r is physical r * E_local + s.

    Args:
        expert_maps: one [logical experts] int32 or int64 tensor for each EP rank, in rank order: the slot on that rank of
            each expert that is there, -1 for the others. Build it on every rank alike.
        shared_expert_ranks: the deployment's. Those ranks are the first; their maps are -1 throughout, and physical
            experts are counted from the first rank after them.

    Returns:
        log2phy, int32 [logical experts], and the number of physical experts, E_local * the ranks with routed experts.
        E_local is the largest slot of any rank plus one. An expert with several copies is taken from the first rank that
        has it.

    Raises:
        ValueError, TypeError: no map, maps of different sizes or of another dtype, a slot twice on a rank, a routed expert
            on a shared-expert rank, an expert that no rank has.
    """
    _check_maps(expert_maps, shared_expert_ranks)
    slots = [each.tolist() for each in expert_maps]
    local = 1 + max(max(of_rank, default=-1) for of_rank in slots)
    physical: dict[int, int] = {}
    for rank, of_rank in enumerate(slots):
        for slot, expert in _experts_by_slot(rank, of_rank, shared_expert_ranks).items():
            physical.setdefault(expert, (rank - shared_expert_ranks) * local + slot)
    missing = [expert for expert in range(len(slots[0])) if expert not in physical]
    if missing:
        raise ValueError(
            f"log2phy_from_expert_maps: no rank has expert {missing[0]}; accepted: a slot for every expert"
        )
    placed = [physical[expert] for expert in range(len(slots[0]))]
    log2phy = torch.tensor(placed, dtype=torch.int32, device=expert_maps[0].device)
    return log2phy, local * (len(slots) - shared_expert_ranks)


def _check_maps(expert_maps: Sequence[Tensor], shared_expert_ranks: int) -> None:
    """The kinds of the arguments of ``log2phy_from_expert_maps``."""
    kinds = "one map, an int32 or int64 tensor, for each EP rank"
    require_instance("log2phy_from_expert_maps", "expert_maps", expert_maps, (list, tuple), kinds)
    if not expert_maps:
        raise ValueError("log2phy_from_expert_maps: expert_maps is empty; accepted: one map for each EP rank")
    most = len(expert_maps) - 1
    require_integer("log2phy_from_expert_maps", "shared_expert_ranks", shared_expert_ranks, 0, most)
    for rank, each in enumerate(expert_maps):
        require_instance("log2phy_from_expert_maps", f"expert_maps[{rank}]", each, Tensor, "an int32 or int64 tensor")
        if each.dim() != 1 or each.shape != expert_maps[0].shape or each.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"log2phy_from_expert_maps: expert_maps[{rank}] is {each.dtype} of shape {list(each.shape)}; accepted: "
                f"int32 or int64 {list(expert_maps[0].shape)}, one entry for each logical expert"
            )


def _experts_by_slot(rank: int, slots: list[int], shared_expert_ranks: int) -> dict[int, int]:
    """The logical expert in each slot of one rank, from the slot of each logical expert; -1 is none."""
    used: dict[int, int] = {}
    for expert, slot in enumerate(slots):
        if slot == -1:
            continue
        if slot < 0:
            raise ValueError(
                f"log2phy_from_expert_maps: expert_maps[{rank}] has {slot} for expert {expert}; accepted: a slot, 0 or "
                "more, or -1 for an expert that is not on the rank"
            )
        if rank < shared_expert_ranks:
            raise ValueError(
                f"log2phy_from_expert_maps: expert_maps[{rank}] has slot {slot} for expert {expert}, and rank {rank} "
                "holds a shared expert; accepted: -1 throughout"
            )
        if slot in used:
            raise ValueError(
                f"log2phy_from_expert_maps: expert_maps[{rank}] has slot {slot} for the experts {used[slot]} and "
                f"{expert}; accepted: every slot once"
            )
        used[slot] = expert
    return used


def list_experts(model: nn.Module) -> nn.Module:
    """Hold the experts of every MoE module of ``model`` as one tensor each, in place: what CANN's ``mega_moe`` takes.

    Call it last, after ``shard_experts`` and ``quantise_experts``. Weights, biases, scales and offsets become
    ``nn.ParameterList`` of E_local contiguous tensors, under their old names; transformers' weights that were not
    transposed yet become [K, N]. Modules whose experts are lists already stay as they are.

    Returns:
        ``model``.

    Raises:
        ValueError: ``model`` has no MoE module, or one whose weights are computed. The model is as it was then.
    """
    modules = moe_modules("list_experts", model)
    for name, module in modules:
        refuse_computed(f"list_experts: {name or type(module).__name__}", module)
    for _, module in modules:
        known: Any = module
        own = isinstance(module, MoE)
        turned = not own and not known.is_transposed
        for name in weight_names(module):
            for suffix in SUFFIXES:
                _to_list(module, name + suffix, transpose=turned and not suffix)
        if not own:
            known.is_transposed = True
    warn_of_other_implementations("list_experts", modules)
    return model


def _to_list(module: nn.Module, name: str, *, transpose: bool) -> None:
    stacked = getattr(module, name, None)
    if not isinstance(stacked, Tensor):  # there is none, or it is a list
        return
    with torch.no_grad():
        experts = [
            (each.transpose(0, 1) if transpose else each).clone(memory_format=torch.contiguous_format)
            for each in stacked.unbind(0)
        ]
    delattr(module, name)
    setattr(module, name, nn.ParameterList(nn.Parameter(each, requires_grad=False) for each in experts))
