"""Calls of MC2's dispatch and combine on ranks, and vectors written by hand for them.

Two ranks, H = 1024 (the least that A3 accepts), rows constant: a row is written as one number. Token t of rank r is
10 * r + t + 1. With E = 4, experts 0 and 1 live on rank 0, experts 2 and 3 on rank 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from moe_lowering import simulator
from moe_lowering.simulator import state

H, E, RANKS = 1024, 4, 2
LOWEST = torch.iinfo(torch.int32).min
IDS = [[[0, 2], [3, 1], [2, 0]], [[2, 3], [0, 1], [1, 2]]]  # [rank][token][k]
DISPATCH, COMBINE = "npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2"


def setup_rank() -> None:
    simulator.enable()


def tokens_of(rank: int, count: int = 3) -> torch.Tensor:
    return (10 * rank + torch.arange(1, count + 1.0)).unsqueeze(1).expand(count, H).to(torch.bfloat16)


def column(rows: torch.Tensor) -> list[float]:
    """The number that each row consists of; NaN rows as None."""
    assert bool(((rows == rows[:, :1]) | rows.isnan()).all())
    return [None if bool(r.isnan()) else r.item() for r in rows[:, 0].float()]


def group_name() -> str:
    return dist.group.WORLD.group_name


def on_soc(soc: str) -> None:
    """What the kernels of this process take as SoC. torch_npu itself stays on the one that was enabled."""
    state.soc = lambda: soc


def call(name: str, rank: int, soc: str, arguments: dict[str, Any]) -> Any:
    """The operator on this rank; ValueErrors as ("refused", text), since a rank that raises closes the pool."""
    on_soc(soc)
    arguments = {"group_ep": group_name(), "ep_world_size": RANKS, "ep_rank_id": rank, "moe_expert_num": E, **arguments}
    try:
        result = getattr(torch.ops.npu, name)(**arguments)
    except ValueError as error:
        return "refused", str(error)
    finally:
        on_soc("A3")
    return result


def dispatch(rank: int, changes: dict[str, Any], only: int = -1, soc: str = "A3") -> Any:
    """Dispatch of the tokens above; ``changes`` on every rank, or on rank ``only``."""
    arguments = {"x": tokens_of(rank), "expert_ids": torch.tensor(IDS[rank], dtype=torch.int32)}
    return call(DISPATCH, rank, soc, {**arguments, **(changes if only in (-1, rank) else {})})


def combine(rank: int, changes: dict[str, Any], only: int = -1, soc: str = "A3") -> Any:
    arguments = {**RECEIVED[rank], **(changes if only in (-1, rank) else {})}
    return call(COMBINE, rank, soc, arguments)


# What rank 0 and rank 1 receive: by expert, source rank, token.
ROWS = [[1, 3, 12, 2, 12, 13], [1, 3, 11, 13, 2, 11]]
TRIPLES = [
    [[0, 0, 0], [0, 2, 1], [1, 1, 0], [0, 1, 1], [1, 1, 1], [1, 2, 0]],
    [[0, 0, 1], [0, 2, 0], [1, 0, 0], [1, 2, 1], [0, 1, 0], [1, 0, 1]],
]
COUNTS = [[2, 3, 4, 6], [2, 4, 5, 6]]  # prefix sums over (local expert, source rank)
A = 3 * RANKS * 2


def received(rank: int) -> dict[str, Any]:
    """Arguments of combine, written by hand: expert g multiplies its rows by 2 ** g."""
    rows = torch.full((A, H), float("nan"), dtype=torch.bfloat16)
    scale = torch.tensor([1, 1, 1, 2, 2, 2] if rank == 0 else [4, 4, 4, 4, 8, 8])
    rows[:6] = (torch.tensor(ROWS[rank]) * scale).unsqueeze(1).to(torch.bfloat16)
    assist = torch.full((128 * A,), LOWEST, dtype=torch.int32)
    assist[:18] = torch.tensor(TRIPLES[rank]).flatten()
    return {
        "expand_x": rows,
        "expert_ids": torch.tensor(IDS[rank], dtype=torch.int32),
        "assist_info_for_combine": assist,
        "ep_send_counts": torch.tensor(COUNTS[rank], dtype=torch.int32),
        "expert_scales": torch.tensor([[0.5, 0.25], [1.0, 0.5], [2.0, 1.0]]),
    }


RECEIVED = [received(0), received(1)]
# rank 0: token 1: .5*1 + .25*4; token 2: 1*16 + .5*4; token 3: 2*12 + 1*3. rank 1: 11: .5*44 + .25*88; ...
COMBINED = [[1.5, 18.0, 27.0], [44.0, 24.0, 104.0]]


def dispatch_then_combine(
    rank: int, arguments: list[dict[str, Any]], soc: str, changes: dict[str, Any] | None = None
) -> Any:
    """y of the pair with experts that change nothing and weights of dispatch, or 0.5; and what dispatch returned.

    ``changes`` are for combine, on every rank.
    """
    own = {"x": tokens_of(rank), "expert_ids": torch.tensor(IDS[rank], dtype=torch.int32), **arguments[rank]}
    out = call(DISPATCH, rank, soc, own)
    if out[0] == "refused":
        return out
    passed_on = (
        "expert_ids", "x_active_mask", "global_bs", "expert_scales", "tp_world_size", "comm_alg", "zero_expert_num",
        "copy_expert_num", "const_expert_num",
    )  # fmt: skip
    common = {"expert_scales": torch.full(tuple(own["expert_ids"].shape), 0.5)}
    common |= {n: own[n] for n in passed_on if n in own}
    received = {
        "expand_x": out[0],
        "assist_info_for_combine": out[2],
        "ep_send_counts": out[4],
        "expand_scales": out[6],
    }
    return call(COMBINE, rank, soc, {**received, **common, **(changes or {})}), out
