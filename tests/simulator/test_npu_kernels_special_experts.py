"""Zero, copy and const experts of MC2's dispatch and combine, against vectors written by hand (mc2_calls.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mc2_calls import RANKS, E, H, column, dispatch, dispatch_then_combine, setup_rank, tokens_of
from rank_pools import Ranks

# Two experts here give nothing (4, 5), one the token (6), two a mixture (7, 8).
KINDS = {"zero_expert_num": 2, "copy_expert_num": 1, "const_expert_num": 2}
IDS = [[[0, 4], [6, 1], [8, 7]], [[5, 6], [7, 2], [1, 3]]]


def lines(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers).unsqueeze(1).expand(len(numbers), H).to(torch.bfloat16).contiguous()


CONST = {
    "const_expert_alpha_1": lines(2.0, 0.0), "const_expert_alpha_2": lines(1.0, 3.0), "const_expert_v": lines(8.0, 4.0)
}  # fmt: skip


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(RANKS, setup=setup_rank, collective_timeout=20.0) as pool:
        yield pool


def run(rank: int, soc: str = "A3", changes: dict[str, Any] | None = None, own: dict[str, Any] | None = None) -> Any:
    """Dispatch and combine with experts that change nothing, all weights 0.5."""
    sent = {"expert_ids": torch.tensor(IDS[rank], dtype=torch.int32), **KINDS, **(own or {})}
    return dispatch_then_combine(rank, [sent] * RANKS, soc, {"ori_x": tokens_of(rank), **CONST, **(changes or {})})


def test_what_they_give(ranks: Ranks) -> None:
    (first, sent), (second, other) = ranks.run(run)
    # token 1: itself and nothing; 2: itself twice; 3: 3 * 4, and 2 * 3 + 8; 11: nothing, itself; 12: 2 * 12 + 8, itself; 13 twice
    assert (column(first), column(second)) == ([0.5, 2.0, 13.0], [5.5, 22.0, 13.0])
    # rows are sent for 1 to expert 0, 2 and 13 to expert 1; 12 to expert 2, 13 to expert 3
    assert column(sent[0])[:4] == [1, 2, 13, None] and column(other[0])[:3] == [12, 13, None]
    assert (sent[3].tolist(), other[3].tolist()) == ([1, 2], [1, 1])


def test_masked_pairs_of_them_give_nothing(ranks: Ranks) -> None:
    mask = torch.tensor([[True, True], [False, True], [True, False]])
    first, second = ranks.run(run, "A3", {"x_active_mask": mask}, {"x_active_mask": mask})
    assert (column(first[0]), column(second[0])) == ([0.5, 1.0, 6.0], [5.5, 6.0, 6.5])


WRONG = {
    "no tokens": ({"ori_x": None}, "mc2.const_experts_ori_x"),
    "fewer tokens": ({"ori_x": tokens_of(0, 2)}, "ori_x is torch.bfloat16 (2, 1024); accepted: torch.bfloat16 (3, 1024)"),
    "tokens in float32": ({"ori_x": tokens_of(0).float()}, "ori_x is torch.float32"),
    "no factors": ({"const_expert_alpha_1": None}, "const_expert_alpha_1 is None; accepted: torch.bfloat16 (2, 1024)"),
    "one line": ({"const_expert_v": lines(1.0)}, "const_expert_v is torch.bfloat16 (1, 1024)"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_combine_refuses(ranks: Ranks, case: str) -> None:
    changes, text = WRONG[case]
    for answer, _ in ranks.run(run, "A3", changes):
        assert answer[0] == "refused" and text in answer[1]


def test_ids_end_with_them(ranks: Ranks) -> None:
    past = torch.tensor([[0, 9], [1, 2], [2, 3]], dtype=torch.int32)
    for answer in ranks.run(run, "A3", {}, {"expert_ids": past}):
        assert answer[0] == "refused"
        assert f"accepted: 0 to moe_expert_num - 1 + zero, copy and const experts = {E + 4}" in answer[1]


def test_ranks_agree_on_their_numbers(ranks: Ranks) -> None:
    for status, text in ranks.run(dispatch, {"copy_expert_num": 1}, 1):
        assert (status, "copy_expert_num is [0, 1] on the ranks" in text) == ("refused", True)


def test_a2_has_no_const_experts(ranks: Ranks) -> None:
    weights = {"expert_scales": torch.full((3, 2), 0.5)}
    assert "mc2.const_experts" in ranks.run(dispatch, {"const_expert_num": 1, **weights}, -1, "A2")[0][1]
