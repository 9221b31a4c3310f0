"""CPU kernels of MC2's dispatch and combine: each by itself against vectors written by hand (mc2_calls.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mc2_calls import (
    COMBINED,
    COUNTS,
    IDS,
    LOWEST,
    RANKS,
    ROWS,
    TRIPLES,
    A,
    E,
    H,
    column,
    combine,
    dispatch,
    dispatch_then_combine,
    setup_rank,
    tokens_of,
)
from rank_pools import Ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(RANKS, setup=setup_rank, collective_timeout=20.0) as pool:
        yield pool


def test_dispatch_by_hand(ranks: Ranks) -> None:
    for rank, out in enumerate(ranks.run(dispatch, {})):
        rows, scales, assist, counts, recv, tp_recv, expand_scales = out
        assert rows.shape == (A, H)
        assert column(rows) == ROWS[rank] + [None] * (A - 6)
        assert scales.shape == (A,)
        assert scales.isnan().all()
        assert assist.shape == (128 * A,)
        assert assist[:18].reshape(6, 3).tolist() == TRIPLES[rank]
        assert (assist[18:] == LOWEST).all()
        assert counts.tolist() == [[3, 3], [4, 2]][rank]
        assert recv.tolist() == COUNTS[rank]
        assert (tp_recv.shape, expand_scales.shape) == ((0,), (0,))


def test_combine_by_hand(ranks: Ranks) -> None:
    for rank, y in enumerate(ranks.run(combine, {})):
        assert y.dtype == torch.bfloat16
        assert column(y) == COMBINED[rank]


def test_combine_accumulates_in_float32_and_rounds_once(ranks: Ranks) -> None:
    arguments = {"expert_scales": torch.full((3, 2), 256.0), "expand_x": torch.ones(A, H, dtype=torch.bfloat16)}
    arguments["expert_scales"][:, 1] = 1.0  # 257 is no bf16; 256 + 1 rounds to 256, 256 + 3 to 260
    assert [column(y) for y in ranks.run(combine, arguments)] == [[256.0] * 3] * 2
    arguments["expert_scales"][:, 1] = 3.0
    assert [column(y) for y in ranks.run(combine, arguments)] == [[260.0] * 3] * 2


def test_combine_adds_the_shared_expert_with_weight_one(ranks: Ranks) -> None:
    shared = {"shared_expert_x": torch.full((3, H), 0.5, dtype=torch.bfloat16)}
    assert column(ranks.run(combine, shared)[0]) == [v + 0.5 for v in COMBINED[0]]


def test_mask_keeps_the_first_tokens(ranks: Ranks) -> None:
    mask = {"x_active_mask": torch.tensor([True, True, False])}
    out = ranks.run(dispatch, mask, 0)  # rank 1 sends everything
    assert column(out[0][0])[:5] == [1, 12, 2, 12, 13]
    assert column(out[1][0])[:6] == [1, 11, 13, 2, 11, None]
    assert (out[0][4].tolist(), out[1][4].tolist()) == ([1, 2, 3, 5], [1, 3, 4, 5])


def test_masked_tokens_come_back_undefined(ranks: Ranks) -> None:
    masks = [{"x_active_mask": torch.tensor([True, True, False])}, {"x_active_mask": torch.zeros(3, dtype=torch.bool)}]
    (first, _), (second, _) = ranks.run(dispatch_then_combine, masks, "A3")
    assert column(first) == [1, 2, None]
    assert column(second) == [None] * 3


def test_ranks_with_different_tokens_need_global_bs(ranks: Ranks) -> None:
    short = {"x": tokens_of(0, 1), "expert_ids": torch.tensor([[3, 1]], dtype=torch.int32)}
    (first, sent), (second, _) = ranks.run(dispatch_then_combine, [{**short, "global_bs": 6}, {"global_bs": 6}], "A3")
    assert (column(first), column(second)) == ([1], [11, 12, 13])
    assert sent[0].shape == (A, H), "A is from global_bs, not from this rank's T"
    for answer in ranks.run(dispatch_then_combine, [short, {}], "A3"):
        assert answer[0] == "refused"
        assert "tokens of the ranks are [1, 3] while global_bs is 0" in answer[1]


def test_expert_token_nums_as_prefix_sums(ranks: Ranks) -> None:
    assert [out[3].tolist() for out in ranks.run(dispatch, {"expert_token_nums_type": 0})] == [[3, 6], [4, 6]]


def test_int8_per_token(ranks: Ranks) -> None:
    smooth = torch.ones(E, H)
    smooth[2] = 3.0
    plain, smoothed = (ranks.run(dispatch, {"quant_mode": 2, **more})[1] for more in ({}, {"scales": smooth}))
    assert (plain[0].dtype, plain[0][:6, 0].tolist()) == (torch.int8, [127] * 6)
    torch.testing.assert_close(plain[1][:6], torch.tensor(ROWS[1]) / 127)
    torch.testing.assert_close(smoothed[1][:6], torch.tensor(ROWS[1]) * torch.tensor([3, 3, 3, 3, 1, 1]) / 127)
    assert plain[1][6:].isnan().all()
    assert (plain[0][6:] == -128).all()


WEIGHTS = [{"expert_scales": torch.arange(6.0).reshape(3, 2) + 10 * rank} for rank in range(2)]


def test_a2_moves_the_weights(ranks: Ranks) -> None:
    (y, out), _ = ranks.run(dispatch_then_combine, WEIGHTS, "A2")
    assert column(y) == [0 + 1, 2 * (2 + 3), 3 * (4 + 5)]
    assert out[6][:6].tolist() == [0, 5, 12, 3, 13, 14]
    assert out[6][6:].isnan().all()


def test_a5_moves_the_weights_when_they_are_given(ranks: Ranks) -> None:
    (y, out), _ = ranks.run(dispatch_then_combine, WEIGHTS, "A5")
    assert (column(y), out[6][:2].tolist()) == ([1, 10, 27], [0, 5])
    (y, out), _ = ranks.run(dispatch_then_combine, [{}, {}], "A5")
    assert (column(y), out[6].shape) == ([1, 2, 3], (0,))


@pytest.mark.parametrize("algorithm", ["fullmesh_v1", "fullmesh_v2"])
def test_a3_has_other_algorithms(ranks: Ranks, algorithm: str) -> None:
    (y, out), _ = ranks.run(dispatch_then_combine, [{"comm_alg": algorithm, "tp_world_size": 1}] * 2, "A3")
    assert column(y) == [1, 2, 3]
    assert column(out[0])[:6] == ROWS[0]
    assert out[5].tolist() == [LOWEST], "tp_recv_counts has one value, which nobody reads"


# --------------------------------------------------------------------------------------------------- masks of (token, k)

PAIRS = torch.tensor([[True, False], [False, False], [True, True]])


def test_mask_of_pairs(ranks: Ranks) -> None:
    (first, sent), (second, received) = ranks.run(dispatch_then_combine, [{"x_active_mask": PAIRS}, {}], "A3")
    assert column(sent[0])[:6] == [1, 3, 12, 12, 13, None]
    assert column(received[0])[:5] == [3, 11, 13, 11, None]
    assert (sent[4].tolist(), received[4].tolist()) == ([2, 3, 3, 5], [1, 3, 3, 4])
    assert sent[2][:15].reshape(5, 3).tolist() == [[0, 0, 0], [0, 2, 1], [1, 1, 0], [1, 1, 1], [1, 2, 0]]
    assert column(first) == [0.5, None, 3], "a token of which no pair is sent is not written"
    assert column(second) == [11, 12, 13]


def test_masked_pairs_are_not_looked_at(ranks: Ranks) -> None:
    """Their ids may be anything, their weights too; the shared expert does not make up for a token that is masked."""
    own = {"x_active_mask": PAIRS, "expert_ids": torch.tensor([[0, -7], [9, 9], [2, 0]], dtype=torch.int32)}
    weights = torch.full((3, 2), 0.5)
    weights[~PAIRS] = float("nan")
    changes = {"expert_scales": weights, "shared_expert_x": torch.ones(3, H, dtype=torch.bfloat16)}
    arguments = [own, {"x_active_mask": PAIRS}]
    (first, _), (second, _) = ranks.run(dispatch_then_combine, arguments, "A3", changes)
    assert (column(first), column(second)) == ([1.5, None, 4], [6.5, None, 14])


# -------------------------------------------------------------------------------------------- rows that travel as int8


def test_combine_through_int8(ranks: Ranks) -> None:
    """Eight values share a scale, max / 127: in the first eight it is 1, in the next 2 ** -7, in the others 0."""
    eight = torch.tensor([127, 0.5, 0.625, -1.5, 2.5, -0.25, 1, 0])
    rows = torch.zeros(A, H)
    rows[:, :8], rows[:, 8:16] = eight, eight / 128
    changes = {"expand_x": rows.bfloat16(), "expert_scales": torch.tensor([[1.0, 0.0]] * 3), "comm_quant_mode": 2}
    for y in ranks.run(combine, changes):
        rounded = torch.tensor([127, 0, 1, -2, 2, 0, 1, 0])
        assert y[:, :8].tolist() == [rounded.tolist()] * 3
        assert y[:, 8:16].tolist() == [(rounded / 128).tolist()] * 3
        assert (y[:, 16:] == 0).all()


def meta_shapes(rank: int, changes: dict[str, Any]) -> Any:
    on_cpu = dispatch(rank, changes)
    arguments = {"x": tokens_of(rank), "expert_ids": torch.tensor(IDS[rank], dtype=torch.int32), **changes}
    meta = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    fake = torch.ops.npu.npu_moe_distribute_dispatch_v2(
        **meta, group_ep="", ep_world_size=RANKS, ep_rank_id=rank, moe_expert_num=E
    )
    return [[(tuple(t.shape), t.dtype) for t in out] for out in (on_cpu, fake)]


@pytest.mark.parametrize(
    "changes",
    [{}, {"global_bs": 8}, {"tp_world_size": 1}, {"quant_mode": 2}, {"quant_mode": 2, "scales": torch.ones(E, H)}],
)
def test_shapes_are_those_of_the_meta_function(ranks: Ranks, changes: dict[str, Any]) -> None:
    for on_cpu, meta in ranks.run(meta_shapes, changes):
        assert on_cpu == meta


# --- zero, copy and const experts

# Two experts here give nothing (4, 5), one the token (6), two a mixture (7, 8).
KINDS = {"zero_expert_num": 2, "copy_expert_num": 1, "const_expert_num": 2}
SPECIAL_IDS = [[[0, 4], [6, 1], [8, 7]], [[5, 6], [7, 2], [1, 3]]]


def lines(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers).unsqueeze(1).expand(len(numbers), H).to(torch.bfloat16).contiguous()


CONST = {
    "const_expert_alpha_1": lines(2.0, 0.0), "const_expert_alpha_2": lines(1.0, 3.0), "const_expert_v": lines(8.0, 4.0)
}  # fmt: skip


def with_special(
    rank: int, soc: str = "A3", changes: dict[str, Any] | None = None, own: dict[str, Any] | None = None
) -> Any:
    """Dispatch and combine with experts that change nothing, all weights 0.5."""
    sent = {"expert_ids": torch.tensor(SPECIAL_IDS[rank], dtype=torch.int32), **KINDS, **(own or {})}
    return dispatch_then_combine(rank, [sent] * RANKS, soc, {"ori_x": tokens_of(rank), **CONST, **(changes or {})})


def test_what_special_experts_give(ranks: Ranks) -> None:
    (first, sent), (second, other) = ranks.run(with_special)
    # token 1: itself and nothing; 2: itself twice; 3: 3 * 4, and 2 * 3 + 8; 11: nothing, itself; 12: 2 * 12 + 8, itself; 13 twice
    assert (column(first), column(second)) == ([0.5, 2.0, 13.0], [5.5, 22.0, 13.0])
    # rows are sent for 1 to expert 0, 2 and 13 to expert 1; 12 to expert 2, 13 to expert 3
    assert column(sent[0])[:4] == [1, 2, 13, None] and column(other[0])[:3] == [12, 13, None]
    assert (sent[3].tolist(), other[3].tolist()) == ([1, 2], [1, 1])


def test_masked_pairs_of_special_experts_give_nothing(ranks: Ranks) -> None:
    mask = torch.tensor([[True, True], [False, True], [True, False]])
    first, second = ranks.run(with_special, "A3", {"x_active_mask": mask}, {"x_active_mask": mask})
    assert (column(first[0]), column(second[0])) == ([0.5, 1.0, 6.0], [5.5, 6.0, 6.5])


WRONG = {
    "no tokens": ({"ori_x": None}, "mc2.const_experts_ori_x"),
    "fewer tokens": ({"ori_x": tokens_of(0, 2)}, "ori_x is torch.bfloat16 (2, 1024); accepted: torch.bfloat16 (3, 1024)"),
    "tokens in float32": ({"ori_x": tokens_of(0).float()}, "ori_x is torch.float32"),
    "no factors": ({"const_expert_alpha_1": None}, "const_expert_alpha_1 is None; accepted: torch.bfloat16 (2, 1024)"),
    "one line": ({"const_expert_v": lines(1.0)}, "const_expert_v is torch.bfloat16 (1, 1024)"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_combine_refuses_wrong_tensors_of_special_experts(ranks: Ranks, case: str) -> None:
    changes, text = WRONG[case]
    for answer, _ in ranks.run(with_special, "A3", changes):
        assert answer[0] == "refused" and text in answer[1]


def test_ids_end_with_special_experts(ranks: Ranks) -> None:
    past = torch.tensor([[0, 9], [1, 2], [2, 3]], dtype=torch.int32)
    for answer in ranks.run(with_special, "A3", {}, {"expert_ids": past}):
        assert answer[0] == "refused"
        assert f"accepted: 0 to moe_expert_num - 1 + zero, copy and const experts = {E + 4}" in answer[1]


def test_ranks_agree_on_special_experts(ranks: Ranks) -> None:
    for status, text in ranks.run(dispatch, {"copy_expert_num": 1}, 1):
        assert (status, "copy_expert_num is [0, 1] on the ranks" in text) == ("refused", True)


def test_a2_has_no_const_experts(ranks: Ranks) -> None:
    weights = {"expert_scales": torch.full((3, 2), 0.5)}
    assert "mc2.const_experts" in ranks.run(dispatch, {"const_expert_num": 1, **weights}, -1, "A2")[0][1]
