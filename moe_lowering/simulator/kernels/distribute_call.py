"""What npu_moe_distribute_dispatch_v2 and npu_moe_distribute_combine_v2 of one rank have in common.

Routed expert g lives on rank S + g // E_local, where the first S ranks hold shared experts (shared_expert_rank_num): shared
expert j on ranks j * P to (j + 1) * P - 1, P = S / shared_expert_num, of which rank r sends its tokens to the one of index
r % P. ``group_ep`` is the name of a process group here, and that of an HCCL communicator on a
device. A mask of one axis says which tokens take part (the first ones), one of two axes which (token, k) pairs do; a token
without any pair takes no part. Ids past the experts: ``special_experts``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from moe_lowering.simulator.kernels.common import make_undefined
from moe_lowering.simulator.kernels.exchange import GroupLike, agree, resolve
from moe_lowering.simulator.kernels.special_experts import special_experts

DISPATCH, COMBINE = "npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2"
AT_DISPATCH, AT_COMBINE, AT_RETURN = 0, 1, 2  # stages of ``agree``
ALGORITHMS = ("", "fullmesh", "fullmesh_v1", "fullmesh_v2", "hierarchy")  # comm_alg


@dataclasses.dataclass(frozen=True)
class DistributeCall:
    """What dispatch and combine of one rank have in common, checked."""

    operator: str
    group: GroupLike
    rank: int
    ep_size: int
    experts: int
    ids: torch.Tensor  # [T, K] int32
    chosen: torch.Tensor  # [T, K] bool: not masked
    max_bs: int  # the most tokens of a rank
    shared_ranks: int
    shared_experts: int  # 0 without shared ranks

    @property
    def routed_experts(self) -> int:
        """Experts of a rank that has routed ones."""
        return self.experts // (self.ep_size - self.shared_ranks)

    @property
    def on_shared_rank(self) -> bool:
        return self.rank < self.shared_ranks

    @property
    def local_experts(self) -> int:
        """Experts of this rank."""
        return 1 if self.on_shared_rank else self.routed_experts

    @property
    def max_rows(self) -> int:
        """A: rows that dispatch allocates. A shared rank has room for the ranks that it serves."""
        if self.on_shared_rank:
            return self.max_bs * -(-self.ep_size // (self.shared_ranks // self.shared_experts))
        return self.max_bs * self.ep_size * min(self.routed_experts, self.top_k)

    @property
    def sent(self) -> torch.Tensor:
        """[T, K] bool: pairs for which a row is sent, not those of zero, copy and const experts."""
        return self.chosen & (self.ids < self.experts)

    @property
    def active(self) -> torch.Tensor:
        """[T] bool: tokens that take part."""
        return self.chosen.any(1)

    def shared_rank(self, source: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        """The ranks to which tokens of ranks ``source`` go for shared experts ``expert``."""
        each = self.shared_ranks // max(self.shared_experts, 1)
        return source % max(each, 1) + expert * each

    @property
    def top_k(self) -> int:
        return self.ids.shape[1]


def _unmasked_pairs(mask: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
    """Which (token, k) pairs are not masked: bool [T, K]."""
    if mask is None:
        return torch.ones(ids.shape, dtype=torch.bool)
    return mask if mask.dim() == 2 else mask.unsqueeze(1).expand(ids.shape)


def _value_refusal(operator: str, a: dict[str, Any]) -> str:
    """What the values of ids and mask break, and the documented forms that are not computed here; "" when nothing."""
    mask, ids = a["x_active_mask"], a["expert_ids"]
    unsupported = {"performance_info": None}
    if operator == DISPATCH:
        unsupported |= {"y_dtype": None, "x_dtype": None, "scales_dtype": None}
    for argument, accepted in unsupported.items():
        if a[argument] != accepted:
            return f"{operator}: {argument} is {a[argument]}; the CPU kernel computes only: {accepted}"
    if mask is not None and mask.dim() == 2 and mask.shape != ids.shape:
        return f"{operator}: x_active_mask is {tuple(mask.shape)}; accepted: {tuple(ids.shape)} (as expert_ids), or 1-D"
    if mask is not None and mask.dim() == 1 and bool((mask[1:] & ~mask[:-1]).any()):
        return f"{operator}: x_active_mask is {mask.tolist()}; accepted: all True before the first False"
    sent = _unmasked_pairs(mask, ids)
    values = ids[sent]
    number, words = a["moe_expert_num"] + special_experts(a), "moe_expert_num - 1"
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= number):
        words = f"{words} + zero, copy and const experts" if number > a["moe_expert_num"] else words
        bounds = f"{int(values.min())} to {int(values.max())}"
        return f"{operator}: expert_ids is {bounds}; accepted: 0 to {words} = {number - 1}"
    # a masked pair stands for an expert of its own, which no other pair has
    ordered = torch.where(sent, ids.long(), -1 - torch.arange(ids.shape[1])).sort(-1).values
    repeated = torch.nonzero((ordered[:, 1:] == ordered[:, :-1]).any(-1)).flatten()
    if len(repeated):
        row = int(repeated[0])
        return f"{operator}: expert_ids of token {row} is {ids[row].tolist()}; accepted: no expert twice for one token"
    return ""


def begin_call(
    operator: str, refusal: str, a: dict[str, Any], x: torch.Tensor, facts: dict[str, int]
) -> DistributeCall:
    """Check this rank's values, agree with the others, and return what the call is about.

    Raises:
        ValueError: on every rank when one refuses; the ranks' arguments differ; or T differs while global_bs is 0.
    """
    refusal = refusal or _value_refusal(operator, a)
    group, wrong = resolve(operator, a["group_ep"], a["ep_world_size"], a["ep_rank_id"])
    if group is None:
        raise ValueError("; ".join(text for text in (refusal, wrong) if text))
    ids, global_bs, ep_size = a["expert_ids"], a["global_bs"], a["ep_world_size"]
    place = AT_DISPATCH if operator == DISPATCH else AT_COMBINE
    everyone = agree(operator, group, place, refusal or wrong, {**_common_facts(a, x), **facts})
    tokens = [row["own_tokens"] for row in everyone]
    if global_bs == 0 and len(set(tokens)) > 1:
        raise ValueError(
            f"{operator}: tokens of the ranks are {tokens} while global_bs is 0; accepted: the same on all ranks, or "
            "global_bs = largest * ep_world_size"
        )
    return DistributeCall(
        operator=operator,
        group=group,
        rank=a["ep_rank_id"],
        ep_size=ep_size,
        experts=a["moe_expert_num"],
        ids=ids,
        chosen=_unmasked_pairs(a["x_active_mask"], ids),
        max_bs=global_bs // ep_size or len(ids),
        shared_ranks=a["shared_expert_rank_num"],
        shared_experts=a["shared_expert_num"] if a["shared_expert_rank_num"] else 0,
    )


def _common_facts(a: dict[str, Any], x: torch.Tensor) -> dict[str, int]:
    """What a rank tells the others of every call, as numbers."""
    ids = a["expert_ids"]
    return {
        "own_tokens": len(ids),
        "hidden": x.shape[-1],
        "bytes per element of x": x.element_size(),
        "top_k": ids.shape[-1],
        "moe_expert_num": a["moe_expert_num"],
        "shared_expert_num": a["shared_expert_num"],
        "shared_expert_rank_num": a["shared_expert_rank_num"],
        "zero_expert_num": a["zero_expert_num"],
        "copy_expert_num": a["copy_expert_num"],
        "const_expert_num": a["const_expert_num"],
        "global_bs": a["global_bs"],
        "comm_alg (0 is the empty one)": ALGORITHMS.index(a["comm_alg"]) if a["comm_alg"] in ALGORITHMS else -1,
    }


def pad_undefined(size: tuple[int, ...], values: torch.Tensor) -> torch.Tensor:
    """``values`` at the front of an otherwise undefined tensor."""
    out = make_undefined(size, values.dtype)
    out[: len(values)] = values
    return out
