"""CPU kernels of MC2's dispatch and combine on random tokens, against one process that knows the tokens of all ranks.

Four ranks on A3, then 16 for the hierarchical algorithm, which is documented for no fewer.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch
from kernel_calls import assert_quantised
from mc2_calls import COMBINE, DISPATCH, call
from quantised_numbers import snr
from rank_pools import run_on_ranks

H, K = 1024, 3


@dataclasses.dataclass(frozen=True)
class Case:
    """One pair of dispatch and combine. ``tokens`` holds T of each rank; ``mask`` is none, prefix or pairs."""

    soc: str
    tokens: tuple[int, ...]
    experts: int
    mask: str = "none"
    quantised: bool = False
    smooth: bool = False
    prefix_sums: bool = False
    comm_alg: str = ""

    @property
    def size(self) -> int:
        return len(self.tokens)

    @property
    def sends_weights(self) -> bool:
        return self.soc == "A2" or self.comm_alg == "hierarchy"


def inputs(case: Case, rank: int) -> dict[str, torch.Tensor]:
    """x, ids, weights, sent [T, K] bool and smooth scales [E, H] of one rank; the same wherever they are made."""
    generator = torch.Generator().manual_seed(100 * case.experts + rank)
    count = case.tokens[rank]
    x = torch.randn(count, H, generator=generator).bfloat16()
    scores = torch.rand(count, case.experts, generator=generator)
    scores[:, 1] = 0  # nobody chooses expert 1
    ids = scores.topk(K).indices.int()
    sent = torch.ones(count, K, dtype=torch.bool)
    if case.mask == "prefix":
        sent[rank + 1 :] = False
    if case.mask == "pairs":
        sent = torch.rand(count, K, generator=generator) < 0.6
    smooth = torch.rand(case.experts, H, generator=torch.Generator().manual_seed(7)) + 0.5
    return {"x": x, "ids": ids, "weights": torch.rand(count, K, generator=generator), "sent": sent, "smooth": smooth}


def on_rank(rank: int, case: Case) -> Any:
    """What dispatch returned, and y of experts that double, triple, ... their rows."""
    os.environ["HCCL_BUFFSIZE"] = "1024"
    mine = inputs(case, rank)
    shared: dict[str, Any] = {
        "expert_ids": mine["ids"],
        "ep_world_size": case.size,
        "moe_expert_num": case.experts,
        "comm_alg": case.comm_alg,
        "tp_world_size": int(case.soc == "A3"),
    }
    if case.mask != "none":
        shared["x_active_mask"] = mine["sent"][:, 0].contiguous() if case.mask == "prefix" else mine["sent"]
    if len(set(case.tokens)) > 1:
        shared["global_bs"] = max(case.tokens) * case.size
    own: dict[str, Any] = {"x": mine["x"], "expert_token_nums_type": int(not case.prefix_sums)}
    own |= {"quant_mode": 2} if case.quantised else {}
    own |= {"scales": mine["smooth"]} if case.smooth else {}
    own |= {"expert_scales": mine["weights"]} if case.sends_weights else {}
    out = call(DISPATCH, rank, case.soc, {**shared, **own})
    assert out[0] != "refused", out[1]
    counts = out[3].diff(prepend=torch.zeros(1, dtype=torch.int64)) if case.prefix_sums else out[3]
    factor = torch.arange(case.experts // case.size) + rank * (case.experts // case.size) + 2.0
    used = int(counts.sum())
    rows = torch.full(out[0].shape, float("nan"), dtype=torch.bfloat16)
    plain = out[0][:used].float() * (out[1][:used, None] if case.quantised else 1)
    rows[:used] = (plain * factor.repeat_interleave(counts)[:, None]).bfloat16()
    passed = {"expand_x": rows, "assist_info_for_combine": out[2], "ep_send_counts": out[4], "expand_scales": out[6]}
    y = call(COMBINE, rank, case.soc, {**shared, **passed, "expert_scales": mine["weights"]})
    return out, y


def arrivals(case: Case, rank: int) -> list[tuple[int, int, int, int]]:
    """(expert, source rank, token, k) of the rows that a rank receives: a stable sort by expert of all that is sent."""
    local = case.experts // case.size
    found = []
    for source in range(case.size):
        own = inputs(case, source)
        pairs = [(t, k) for t in range(case.tokens[source]) for k in range(K) if own["sent"][t, k]]
        found += [(int(own["ids"][t, k]), source, t, k) for t, k in pairs]
    return sorted((a for a in found if a[0] // local == rank), key=lambda a: a[0])


def check_dispatch(case: Case, rank: int, out: tuple[torch.Tensor, ...]) -> None:
    expected, local = arrivals(case, rank), case.experts // case.size
    everyone = [inputs(case, source) for source in range(case.size)]
    values, n = torch.zeros(len(expected), H, dtype=torch.float64), len(expected)
    for row, (_, source, t, _) in enumerate(expected):
        values[row] = everyone[source]["x"][t].double()
    if case.smooth:
        values *= everyone[0]["smooth"][[e for e, *_ in expected]].double()
    if case.quantised:
        assert_quantised(out[0][:n], out[1][:n], values)
        assert (out[0][n:] == -128).all()
    else:
        assert torch.equal(out[0][:n].double(), values)
        assert out[0][n:].isnan().all()
    assert out[1][n:].isnan().all()
    assert out[0].shape == (max(case.tokens) * case.size * min(local, K), H)
    assert out[2][: 3 * n].reshape(n, 3).tolist() == [list(a[1:]) for a in expected]
    per_source = [sum(a[:2] == (rank * local + e, s) for a in expected) for e in range(local) for s in range(case.size)]
    assert out[4][: local * case.size].tolist() == torch.tensor(per_source).cumsum(0).tolist()
    counts = torch.tensor(per_source).reshape(local, -1).sum(1)
    assert out[3].tolist() == (counts.cumsum(0) if case.prefix_sums else counts).tolist()
    carried = [everyone[s]["weights"][t, k].item() for _, s, t, k in expected]
    assert out[6][:n].tolist() == (carried if case.sends_weights else [])


def check_combine(case: Case, rank: int, y: torch.Tensor) -> None:
    """Within the noise of one bfloat16 rounding of the rows and one of y, or of int8 rows."""
    own = inputs(case, rank)
    factor = (own["ids"].double() + 2) * own["weights"].double() * own["sent"]
    active = own["sent"].any(1)
    expected = factor.sum(1, keepdim=True) * own["x"].double()
    if case.smooth:  # the experts here do not divide by it
        smooth = own["smooth"].double()[own["ids"].long()]
        expected = (factor.unsqueeze(-1) * smooth).sum(1) * own["x"].double()
    assert snr(y[active], expected[active]) > (38 if case.quantised else 48)
    assert y[~active].isnan().all()


def on_rank_all(rank: int, cases: list[Case]) -> list[Any]:
    return [on_rank(rank, case) for case in cases]


EQUAL, UNEQUAL = (5, 5, 5, 5), (1, 5, 2, 4)
CASES = {
    "A3": Case("A3", UNEQUAL, 8),
    "A3-pairs-int8": Case("A3", EQUAL, 8, mask="pairs", quantised=True),
    "A3-prefix-int8-smooth": Case("A3", EQUAL, 8, mask="prefix", quantised=True, smooth=True, prefix_sums=True),
    "A2-int8": Case("A2", UNEQUAL, 4, quantised=True, prefix_sums=True),
    "A5-pairs": Case("A5", EQUAL, 8, mask="pairs"),
}
HIERARCHY = {
    "A2": Case("A2", (2,) * 16, 32, comm_alg="hierarchy"),
    "A3-int8": Case("A3", (2,) * 16, 32, quantised=True, comm_alg="hierarchy"),
}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    ranks = run_on_ranks(4, on_rank_all, list(CASES.values()))
    return {name: [rank[i] for rank in ranks] for i, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_random(results: dict[str, Any], name: str) -> None:
    for rank, (out, y) in enumerate(results[name]):
        check_dispatch(CASES[name], rank, out)
        check_combine(CASES[name], rank, y)


def hierarchy(rank: int) -> list[Any]:
    """The cases, and what dispatch says without weights."""
    case = HIERARCHY["A3-int8"]
    own, size = inputs(case, rank), {"ep_world_size": 16, "moe_expert_num": 32, "tp_world_size": 1}
    done = on_rank_all(rank, list(HIERARCHY.values()))
    arguments = {"x": own["x"], "expert_ids": own["ids"], "comm_alg": "hierarchy", **size}
    return [*done, call(DISPATCH, rank, "A3", arguments)]


def test_hierarchy_of_16_ranks() -> None:
    for rank, (*done, without_weights) in enumerate(run_on_ranks(16, hierarchy)):
        for case, (out, y) in zip(HIERARCHY.values(), done, strict=True):
            check_dispatch(case, rank, out)
            check_combine(case, rank, y)
        assert (without_weights[0], "mc2.weights" in without_weights[1]) == ("refused", True)
