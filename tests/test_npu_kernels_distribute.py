"""CPU kernels of MC2's dispatch and combine: each by itself against vectors written by hand, then refusals.

Two ranks, H = 1024 (the least that A3 accepts), rows constant: a row is written as one number. Token t of rank r is
10 * r + t + 1. With E = 4, experts 0 and 1 live on rank 0, experts 2 and 3 on rank 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_lowering import simulator
from moe_lowering.testing.ranks import Ranks

H, E, RANKS = 1024, 4, 2
LOWEST = torch.iinfo(torch.int32).min
IDS = [[[0, 2], [3, 1], [2, 0]], [[2, 3], [0, 1], [1, 2]]]  # [rank][token][k]
DISPATCH, COMBINE = "npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2"


def setup_rank() -> None:
    simulator.enable()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(RANKS, setup=setup_rank, collective_timeout=20.0) as pool:
        yield pool


def tokens_of(rank: int, count: int = 3) -> torch.Tensor:
    return (10 * rank + torch.arange(1, count + 1.0)).unsqueeze(1).expand(count, H).to(torch.bfloat16)


def column(rows: torch.Tensor) -> list[float]:
    """The number that each row consists of; NaN rows as None."""
    assert bool(((rows == rows[:, :1]) | rows.isnan()).all())
    return [None if bool(r.isnan()) else r.item() for r in rows[:, 0].float()]


def group_name() -> str:
    return dist.group.WORLD.group_name


def on_soc(soc: str) -> None:
    from moe_lowering.simulator.kernels import common, distribute

    common.current_soc = distribute.current_soc = lambda: soc


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


def dispatch_then_combine(rank: int, arguments: list[dict[str, Any]], soc: str) -> Any:
    """y of the pair with experts that change nothing, and what dispatch returned."""
    mine = {"x": tokens_of(rank), "expert_ids": torch.tensor(IDS[rank], dtype=torch.int32), **arguments[rank]}
    out = call(DISPATCH, rank, soc, mine)
    if out[0] == "refused":
        return out
    common = {n: mine[n] for n in ("expert_ids", "x_active_mask", "global_bs") if n in mine}
    weights = torch.full(tuple(mine["expert_ids"].shape), 0.5)
    expand = {"expand_scales": out[6]} if soc == "A2" else {}
    y = call(
        COMBINE, rank, soc,
        {"expand_x": out[0], "assist_info_for_combine": out[2], "ep_send_counts": out[4], "expert_scales": weights,
         **common, **expand},
    )  # fmt: skip
    return y, out


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


def test_a2_moves_the_weights(ranks: Ranks) -> None:
    weights = [{"expert_scales": torch.arange(6.0).reshape(3, 2) + 10 * rank} for rank in range(2)]
    (y, out), _ = ranks.run(dispatch_then_combine, weights, "A2")
    assert column(y) == [1, 2, 3]
    assert out[6][:6].tolist() == [0, 5, 12, 3, 13, 14]
    assert out[6][6:].isnan().all()


def meta_shapes(rank: int, changes: dict[str, Any]) -> Any:
    on_cpu = dispatch(rank, changes)
    arguments = {"x": tokens_of(rank), "expert_ids": torch.tensor(IDS[rank], dtype=torch.int32), **changes}
    meta = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    fake = torch.ops.npu.npu_moe_distribute_dispatch_v2(
        **meta, group_ep="", ep_world_size=RANKS, ep_rank_id=rank, moe_expert_num=E
    )
    return [[(tuple(t.shape), t.dtype) for t in out] for out in (on_cpu, fake)]


@pytest.mark.parametrize("changes", [{}, {"global_bs": 8}, {"tp_world_size": 1}, {"quant_mode": 2}])
def test_shapes_are_those_of_the_meta_function(ranks: Ranks, changes: dict[str, Any]) -> None:
    for on_cpu, meta in ranks.run(meta_shapes, changes):
        assert on_cpu == meta


# ------------------------------------------------------------------------------------------------------------- refusals


def ids(rows: list[list[int]], dtype: torch.dtype = torch.int32) -> dict[str, Any]:
    return {"expert_ids": torch.tensor(rows, dtype=dtype)}


MASK = {"x_active_mask": torch.tensor([True, False, True])}
WEIGHTS = {"expert_scales": torch.ones(3, 2)}
EMPTY = {"x": tokens_of(0, 0), "expert_ids": torch.empty(0, 2, dtype=torch.int32)}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"x": torch.ones(3, H)}, "mc2.x_dtype"),
        ({"x": torch.ones(3, 64).bfloat16()}, "mc2.hidden"),
        (ids(IDS[0], torch.int64), "mc2.ids_dtype"),
        (ids([[0, 0], [1, 2], [2, 3]]), "no expert twice for one token"),
        (ids([[0, 4], [1, 2], [2, 3]]), "expert_ids is 0 to 4; accepted: 0 to"),
        (ids([[0, -1], [1, 2], [2, 3]]), "expert_ids is -1 to 3; accepted: 0 to"),
        (ids(IDS[0][:2]), "mc2.ids_tokens"),
        (EMPTY, "mc2.tokens"),
        ({"moe_expert_num": 5}, "mc2.experts_divisible"),
        ({"moe_expert_num": 1026}, "mc2.experts"),
        ({"ep_rank_id": 2}, "mc2.ep_rank"),
        ({"tp_world_size": 2}, "mc2.tp_size"),
        ({"quant_mode": 1}, "mc2.quant_mode"),
        ({"comm_alg": "ring"}, "mc2.comm_alg"),
        ({"comm_alg": "fullmesh_v2"}, "mc2.tp_size_comm_alg"),
        ({"comm_alg": "hierarchy"}, "mc2.ep_size_per_node"),
        ({"global_bs": 7}, "mc2.global_bs"),
        ({"global_bs": 4}, "mc2.global_bs_tokens"),
        ({"x_active_mask": torch.ones(3, dtype=torch.bool), "global_bs": 6}, "mc2.mask_global_bs"),
        (MASK, "all True before the first False"),
        ({"x_active_mask": torch.ones(3, 2, dtype=torch.bool)}, "x_active_mask is 2-D; the CPU kernel"),
        ({"x_active_mask": torch.ones(3)}, "mc2.mask_dtype"),
        ({"x_active_mask": torch.ones(2, dtype=torch.bool)}, "mc2.mask_tokens"),
        ({"shared_expert_rank_num": 1}, "mc2.shared_expert_ranks"),
        ({"expert_shard_type": 1}, "mc2.expert_shard_type"),
        ({"zero_expert_num": 1}, "zero_expert_num is given; the CPU kernel"),
        ({"scales": torch.ones(E, H)}, "mc2.scales"),
        ({"scales": torch.ones(E + 1, H), "quant_mode": 2}, "mc2.scales_rows"),
        ({"expert_token_nums_type": 2}, "mc2.expert_token_nums_type"),
        (WEIGHTS, "mc2.weights"),
        ({"elastic_info": torch.ones(2)}, "mc2.elastic_info"),
    ],
)
def test_dispatch_refuses_on_every_rank(ranks: Ranks, changes: dict[str, Any], code: str) -> None:
    """Only rank 0's call is illegal; rank 1 raises too instead of waiting."""
    first, second = ranks.run(dispatch, changes, 0)
    assert first[0] == second[0] == "refused"
    assert code in first[1]
    assert "rank [0] of the group refused" in second[1]


@pytest.mark.parametrize("name", ["", "x" * 128, "no such group"])
def test_dispatch_refuses_a_group_that_is_none(ranks: Ranks, name: str) -> None:
    for status, text in ranks.run(dispatch, {"group_ep": name}):
        assert status == "refused"
        assert "accepted: the name of a process group" in text
        assert ("mc2.group_ep" in text) == (name != "no such group")


def test_dispatch_refuses_sizes_that_are_not_the_group_s(ranks: Ranks) -> None:
    for status, text in ranks.run(dispatch, {"ep_world_size": 4}):
        assert (status, "those of the group, 2 and" in text) == ("refused", True)


def test_ranks_must_agree(ranks: Ranks) -> None:
    for status, text in ranks.run(dispatch, {"moe_expert_num": 8}, 1):
        assert status == "refused"
        assert "moe_expert_num is [4, 8] on the ranks" in text


def one_of_each(rank: int) -> Any:
    return dispatch(rank, {}) if rank == 0 else combine(rank, {})


def test_dispatch_does_not_meet_combine(ranks: Ranks) -> None:
    for status, text in ranks.run(one_of_each):
        assert status == "refused"
        assert "stage (dispatch 0, combine 1, its end 2) is [0, 1]" in text


def test_a2_needs_weights_in_dispatch(ranks: Ranks) -> None:
    for status, text in ranks.run(dispatch, {}, -1, "A2"):
        assert (status, "mc2.weights" in text) == ("refused", True)


def test_310p_has_no_mc2(ranks: Ranks) -> None:
    assert "mc2.soc" in ranks.run(dispatch, {}, -1, "310P")[0][1]


def without_buffer(rank: int) -> Any:
    import os

    os.environ["HCCL_BUFFSIZE"] = "2"
    try:
        count = 256
        many = {"x": tokens_of(rank, count), "expert_ids": torch.tensor([[0, 2]] * count, dtype=torch.int32)}
        return dispatch(rank, many)
    finally:
        del os.environ["HCCL_BUFFSIZE"]


def test_dispatch_refuses_a_small_window(ranks: Ranks) -> None:
    # 2 * (2 experts * 256 * 2 ranks * 2560 + (2 + 1) * 256 * 2048) bytes
    status, text = ranks.run(without_buffer)[0]
    assert (status, "[mc2.buffer]" in text, "needs 8 MB of HCCL window" in text) == ("refused", True, True)


def changed(name: str, index: int, value: int, rank: int = 0) -> dict[str, Any]:
    tensor = RECEIVED[rank][name].clone()
    tensor[index] = value
    return {name: tensor}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        (changed("assist_info_for_combine", 0, 1), "assist_info_for_combine of row 0 is [1, 0, 0]"),
        (changed("assist_info_for_combine", 1, -1), "assist_info_for_combine of row 0"),
        (changed("assist_info_for_combine", 2, 2), "assist_info_for_combine of row 0"),
        (changed("ep_send_counts", 1, 9), "ep_send_counts is [2, 9, 4, 6]"),
        (changed("ep_send_counts", 3, 13), "ep_send_counts is [2, 3, 4, 13]"),
        ({"expand_x": torch.ones(6, H).bfloat16()}, "mc2.rows"),
        ({"expand_x": torch.ones(A, H)}, "mc2.x_dtype"),
        ({"expand_x": torch.ones(A, 512).bfloat16()}, "mc2.hidden"),
        ({"assist_info_for_combine": torch.zeros(128, dtype=torch.int32)}, "mc2.assist_length"),
        ({"ep_send_counts": torch.zeros(3, dtype=torch.int32)}, "mc2.counts_length"),
        ({"ep_send_counts": torch.zeros(4)}, "mc2.counts_dtype"),
        ({"expert_scales": torch.ones(3, 2).bfloat16()}, "mc2.weights_dtype"),
        ({"expert_scales": torch.ones(3, 3)}, "mc2.weights_top_k"),
        ({"comm_quant_mode": 2}, "comm_quant_mode is 2; the CPU kernel"),
        ({"comm_quant_mode": 4}, "mc2.comm_quant_mode"),
        ({"global_bs": 6, "x_active_mask": torch.ones(3, dtype=torch.bool)}, "mc2.mask_global_bs"),
    ],
)
def test_combine_refuses_on_every_rank(ranks: Ranks, changes: dict[str, Any], code: str) -> None:
    first, second = ranks.run(combine, changes, 0)
    assert first[0] == second[0] == "refused"
    assert code in first[1]
    assert "rank [0] of the group refused" in second[1]


@pytest.mark.parametrize(
    ("changes", "sufferer", "text"),
    [
        (changed("assist_info_for_combine", 1, 2), 0, "came back"),  # token 0 of expert 0 said to be token 2
        (changed("ep_send_counts", 3, 5), 1, "token 2, k 0 came back 0 times"),
        (changed("assist_info_for_combine", 7, 7), 1, "token 7 came back; accepted: the 3 tokens"),
        (ids([[0, 2], [3, 1], [0, 2]]), 0, "which holds its expert"),
    ],
)
def test_combine_refuses_the_results_of_another_dispatch(
    ranks: Ranks, changes: dict[str, Any], sufferer: int, text: str
) -> None:
    answers = ranks.run(combine, changes, 0)
    assert [status for status, _ in answers] == ["refused"] * 2
    assert text in answers[sufferer][1]
    assert f"rank [{sufferer}] of the group refused" in answers[1 - sufferer][1]


def test_combine_reads_the_assist_info(ranks: Ranks) -> None:
    """Two rows of one expert swapped in assist_info come back swapped: it decides, not the order of the rows."""
    assist = RECEIVED[1]["assist_info_for_combine"].clone()
    assist[0:3], assist[3:6] = torch.tensor([0, 2, 0]), torch.tensor([0, 0, 1])
    assert column(ranks.run(combine, {"assist_info_for_combine": assist}, 1)[0]) == [0.5 + 3, 18, 8 + 3]


def test_a2_combine_needs_expand_scales(ranks: Ranks) -> None:
    assert "mc2.expand_scales" in ranks.run(combine, {}, -1, "A2")[0][1]
