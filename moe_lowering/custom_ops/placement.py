"""Where experts live in an EP group, with or without ranks of their own for shared experts.

With ``shared_expert_ranks`` S of R ranks, ranks 0 to S - 1 hold one shared expert each, and routed expert g lives on rank
S + g // E_local, E_local = num_experts / (R - S). Each of the ``shared_experts`` is held by P = S / shared_experts ranks: a
token of rank r goes to rank r % P + j * P for shared expert j. Meaning: ``aclnnMoeDistributeDispatchV2`` with
expertShardType 0. Source: ops_transformer.dispatch_kernel.

A *place* is one expert of one rank. Places are numbered by rank: those of the shared-expert ranks come first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_lowering.custom_ops.sizes import ceil_div, smaller


class Placement(NamedTuple):
    """The experts of an EP group of ``ep_size`` ranks; plain ints, to be checked by ``check``."""

    num_experts: int
    ep_size: int
    shared_expert_ranks: int = 0
    shared_experts: int = 1
    zero_experts: int = 0  # ids past the routed experts', of experts that live nowhere

    @property
    def num_ids(self) -> int:
        """Ids that a token may have."""
        return self.num_experts + self.zero_experts

    @property
    def local_experts(self) -> int:
        """E_local of a rank with routed experts."""
        return self.num_experts // (self.ep_size - self.shared_expert_ranks)

    @property
    def added(self) -> int:
        """Shared experts that every token goes to, beside its k routed ones."""
        return self.shared_experts if self.shared_expert_ranks else 0

    @property
    def places(self) -> int:
        return self.shared_expert_ranks + self.num_experts

    def row_bound(self, tokens: int, top_k: int, max_rows: int = 0, on_shared_rank: bool = False) -> int:
        """R, the rows that one rank has room for: ``ep_size * tokens * min(k, E_local)``, at most ``max_rows``.

        A shared-expert rank gets each token of the ranks that it serves once: ``ceil(ep_size / P) * tokens``, with
        P = ``shared_expert_ranks / shared_experts`` ranks for each shared expert.

        Args:
            tokens: the most tokens that a rank contributes, may be symbolic.
            max_rows: 0 for no cap.
        """
        if on_shared_rank:
            bound = ceil_div(self.ep_size, self.shared_expert_ranks // self.shared_experts) * tokens
        else:
            bound = self.ep_size * tokens * smaller(top_k, self.local_experts)
        return smaller(bound, max_rows) if max_rows else bound

    def shared_places(self, source: int) -> list[int]:
        """The places to which tokens of rank ``source`` go beside their routed experts, by shared expert."""
        if not self.added:
            return []
        ranks = self.shared_expert_ranks // self.shared_experts
        return [source % ranks + expert * ranks for expert in range(self.shared_experts)]

    def by_rank(self, places: Tensor) -> Tensor:
        """Numbers for each place, [..., places] int64 -> their sums for each rank [..., ep_size]."""
        shared, routed = places[..., : self.shared_expert_ranks], places[..., self.shared_expert_ranks :]
        return torch.cat([shared, routed.reshape(*routed.shape[:-1], -1, self.local_experts).sum(-1)], -1)

    def of_rank(self, places: Tensor, rank: int) -> Tensor:
        """Numbers for each place, [..., places] -> those of one rank's experts."""
        if rank < self.shared_expert_ranks:
            return places[..., rank : rank + 1]
        first = self.shared_expert_ranks + (rank - self.shared_expert_ranks) * self.local_experts
        return places[..., first : first + self.local_experts]


def check(operator: str, placement: Placement) -> None:
    """The rules for the four sizes, in the words of an operator's arguments.

    Raises:
        ValueError: with the argument, its value and what is accepted.
    """
    ep_size, ranks, experts = placement.ep_size, placement.shared_expert_ranks, placement.shared_experts
    if ep_size < 1:
        raise ValueError(f"{operator}: ep_size is {ep_size}; accepted: 1 or more")
    if not 0 <= ranks < ep_size:
        raise ValueError(f"{operator}: shared_expert_ranks is {ranks}; accepted: 0 to ep_size - 1 = {ep_size - 1}")
    if placement.num_experts < 1 or placement.num_experts % (ep_size - ranks):
        name = "ep_size - shared_expert_ranks" if ranks else "ep_size"
        accepted = f"a multiple of {name}, {ep_size - ranks}"
        raise ValueError(f"{operator}: num_experts is {placement.num_experts}; accepted: {accepted}")
    if experts < 1 or (ranks or 1) % experts:
        accepted = f"a divisor of shared_expert_ranks, {ranks}" if ranks else "1, as there are no shared_expert_ranks"
        raise ValueError(f"{operator}: shared_experts is {experts}; accepted: {accepted}")
    if placement.zero_experts < 0 or (placement.zero_experts and ranks):
        accepted = f"0 with shared_expert_ranks {ranks}: no operator takes both" if ranks else "0 or more"
        raise ValueError(f"{operator}: zero_experts is {placement.zero_experts}; accepted: {accepted}")
