"""Shared-expert ranks: dispatch and combine, generic and npu, on four ranks, against vectors written by hand.

T = 2, K = 2, E = 4; rows are constant and written as one number: token t of rank r is 10 * r + t + 1. The first two ranks hold
shared experts, so that rank 2 has experts 0 and 1, and rank 3 experts 2 and 3.
Source: ops_transformer.dispatch_kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mc2_calls
import pytest
import torch
import torch.distributed as dist
from mc2_calls import COMBINE, DISPATCH, LOWEST, column, setup_rank, tokens_of
from rank_pools import Ranks

ops = torch.ops.moe_lowering
E, H, T = 4, 1024, 2
IDS = [[[0, 2], [1, 3]], [[2, 0], [3, 2]], [[0, 1], [2, 1]], [[3, 0], [1, 2]]]  # [rank][token][k]
WEIGHTS = torch.tensor([[0.5, 0.25], [0.25, 1.0]])

# what each rank receives, by expert, source rank, token: (source rank, token, k)
ROUTED = {
    2: [[0, 0, 0], [1, 0, 1], [2, 0, 0], [3, 0, 1], [0, 1, 0], [2, 0, 1], [2, 1, 1], [3, 1, 0]],
    3: [[0, 0, 1], [1, 0, 0], [1, 1, 1], [2, 1, 0], [3, 1, 1], [0, 1, 1], [1, 1, 0], [3, 0, 0]],
}
# one shared expert on two ranks: rank r sends to r % 2, as its choice K. Two of them: rank r sends to both, as K and K + 1.
ONE = {0: [[0, 0, 2], [0, 1, 2], [2, 0, 2], [2, 1, 2]], 1: [[1, 0, 2], [1, 1, 2], [3, 0, 2], [3, 1, 2]]} | ROUTED
TWO = {j: [[r, t, 2 + j] for r in range(4) for t in range(T)] for j in (0, 1)} | ROUTED
TRIPLES = {1: ONE, 2: TWO}
COUNTS = {1: [[4], [4], [4, 4], [5, 3]], 2: [[8], [8], [4, 4], [5, 3]]}
ROOM = {1: [4, 4, 16, 16], 2: [8, 8, 16, 16]}
# inclusive prefix sums over (local expert, source rank)
ENDS = {
    1: [[2, 2, 4, 4], [0, 2, 2, 4], [1, 2, 3, 4, 5, 5, 7, 8], [1, 3, 4, 5, 6, 7, 7, 8]],
    2: [[2, 4, 6, 8], [2, 4, 6, 8], [1, 2, 3, 4, 5, 5, 7, 8], [1, 3, 4, 5, 6, 7, 7, 8]],
}


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with Ranks(4, setup=setup_rank, collective_timeout=20.0) as pool:
        yield pool


def value(triple: list[int]) -> int:
    return 10 * triple[0] + triple[1] + 1


def ids_of(rank: int) -> torch.Tensor:
    return torch.tensor(IDS[rank], dtype=torch.int32)


def factors(rank: int, shared: int, counts: torch.Tensor) -> torch.Tensor:
    """Expert g multiplies by 2 ** g, shared expert 0 by 3, shared expert 1 by 5; one factor for each received row."""
    own = [[3.0], [3.0 if shared == 1 else 5.0], [1.0, 2.0], [4.0, 8.0]][rank]
    return torch.tensor(own).repeat_interleave(counts)


def results(rank: int, shared: int, sent: torch.Tensor | None = None) -> list[float | None]:
    """y of each token; None where no pair of a token is sent."""
    found: list[float | None] = []
    for token, ids in enumerate(IDS[rank]):
        pairs = [k for k in range(2) if sent is None or sent[token, k]]
        v = value([rank, token])
        y = sum(float(WEIGHTS[token, k]) * 2.0 ** ids[k] * v for k in pairs) + v * (3 if shared == 1 else 8)
        found.append(torch.tensor(y).bfloat16().item() if pairs else None)
    return found


# -------------------------------------------------------------------------------------------------- the generic operators


def sizes(shared: int) -> tuple[Any, ...]:
    return E, dist.group.WORLD.group_name, 4, "", 1, 0


def generic(rank: int, shared: int, mask: torch.Tensor | None, max_rows: int = 0, told: bool | None = None) -> Any:
    """Outputs of dispatch, and y of the pair with the experts of ``factors``; the error that either raises."""
    x = tokens_of(rank, T)
    on_shared = rank < 2 if told is None else told
    try:
        rows, scale, counts, handle = ops.dispatch(
            x, x[:, 0].float() / 100, ids_of(rank), mask, *sizes(shared), max_rows, 2, shared, on_shared
        )
    except (ValueError, RuntimeError) as error:
        return type(error).__name__, str(error)
    y_rows = torch.full_like(rows, torch.nan)
    used = int(counts.sum())
    y_rows[:used] = rows[:used] * factors(rank, shared, counts)[:, None].bfloat16()
    y = ops.combine(y_rows, WEIGHTS, ids_of(rank), handle, mask, *sizes(shared), 2, shared)
    return rows, scale, counts, handle, y


@pytest.mark.parametrize("shared", [1, 2])
def test_generic_by_hand(four: Ranks, shared: int) -> None:
    for rank, (rows, scale, counts, handle, y) in enumerate(four.run(generic, shared, None)):
        triples, room = TRIPLES[shared][rank], ROOM[shared][rank]
        past = room - len(triples)
        assert column(rows) == [value(t) for t in triples] + [0] * past
        torch.testing.assert_close(scale, torch.tensor([value(t) / 100 for t in triples] + [0.0] * past))
        assert counts.tolist() == COUNTS[shared][rank] and counts.dtype == torch.int64
        assert handle.tolist() == triples + [[-1, -1, -1]] * past
        assert column(y) == results(rank, shared)


def test_generic_mask_keeps_tokens_from_shared_ranks(four: Ranks) -> None:
    mask = torch.tensor([False, True])
    for rank, (rows, _, counts, handle, y) in enumerate(four.run(generic, 2, mask)):
        expected = [t for t in TWO[rank] if t[1] == 1]
        assert handle[: len(expected)].tolist() == expected and handle[len(expected) :].eq(-1).all()
        assert int(counts.sum()) == len(expected)
        assert column(rows)[: len(expected)] == [value(t) for t in expected]
        assert column(y) == [0.0, results(rank, 2)[1]]


def test_a_cap_binds_shared_ranks_too_and_every_rank_says_so(four: Ranks) -> None:
    """8 rows fit a rank with routed experts; a shared-expert rank gets 8 as well, and 7 are too few for it."""
    assert all(len(answer) == 5 for answer in four.run(generic, 2, None, 8))
    for answer in four.run(generic, 2, None, 7):
        assert answer == ("RuntimeError", "dispatch: EP rank 0 would receive 8 rows; accepted: at most R = 7 of a "
                          "shared-expert rank (max_rows is 7)")  # fmt: skip


def told_wrongly(rank: int) -> Any:
    return generic(rank, 1, None, 0, rank < 1)


def test_a_rank_that_is_told_wrongly_fails_on_every_rank(four: Ranks) -> None:
    for kind, text in four.run(told_wrongly):
        assert kind == "ValueError"
        assert "on_shared_rank is wrong on EP rank 1; accepted: True on the first shared_expert_ranks ranks" in text


def three_of_four(rank: int) -> Any:
    """One shared expert on three ranks: rank 0 serves ranks 0 and 3."""
    out = ops.dispatch(tokens_of(rank, T), None, ids_of(rank), None, *sizes(1), 0, 3, 1, rank < 3)
    return out[0].shape[0], out[3][out[3][:, 0] >= 0].tolist()


def test_a_shared_expert_on_ranks_that_do_not_divide_the_group(four: Ranks) -> None:
    served = [[0, 3], [1], [2]]
    for rank, (room, handle) in enumerate(four.run(three_of_four)[:3]):
        assert (room, handle) == (4, [[r, t, 2] for r in served[rank] for t in range(T)])


def opcheck(rank: int, shared: int) -> None:
    mask = torch.tensor([True, False])
    given = (tokens_of(rank, T), None, ids_of(rank), mask, *sizes(shared), 0, 2, shared, rank < 2)
    torch.library.opcheck(ops.dispatch.default, given)
    rows, _, _, handle = ops.dispatch(*given)
    torch.library.opcheck(ops.combine.default, (rows, WEIGHTS, ids_of(rank), handle, mask, *sizes(shared), 2, shared))


@pytest.mark.parametrize("shared", [1, 2])
def test_opcheck_on_both_kinds_of_rank(four: Ranks, shared: int) -> None:
    four.run(opcheck, shared)


# ------------------------------------------------------------------------------------------------------ npu's operators


def call(name: str, rank: int, arguments: dict[str, Any], soc: str = "A3") -> Any:
    common = {"ep_world_size": 4, "moe_expert_num": E, "expert_ids": ids_of(rank), "shared_expert_rank_num": 2}
    return mc2_calls.call(name, rank, soc, {**common, **arguments})


def npu(rank: int, shared: int, by_rank: list[dict[str, Any]], soc: str = "A3", changes: Any = None) -> Any:
    """What dispatch returned and y of the pair; a refusal as ("refused", text). ``changes``: (rank, arguments of combine)."""
    own = {"shared_expert_num": shared, **by_rank[rank]}
    out = call(DISPATCH, rank, {"x": tokens_of(rank, T), **own}, soc)
    if out[0] == "refused":
        return out
    counts = out[3]
    used = int(counts.sum())
    rows = torch.full(out[0].shape, torch.nan, dtype=torch.bfloat16)
    received = out[0][:used].float() * (out[1][:used, None] if "quant_mode" in own else 1)
    rows[:used] = (received * factors(rank, shared, counts)[:, None]).bfloat16()
    passed = {"expand_x": rows, "assist_info_for_combine": out[2], "ep_send_counts": out[4], "expert_scales": WEIGHTS}
    kept = {n: v for n, v in own.items() if n in ("x_active_mask", "global_bs", "shared_expert_num")}
    changed = changes[1] if changes is not None and changes[0] in (-1, rank) else {}
    return out, call(COMBINE, rank, {**kept, **passed, **changed}, soc)


NOTHING: list[dict[str, Any]] = [{}, {}, {}, {}]


@pytest.mark.parametrize("soc", ["A3", "A5"])
@pytest.mark.parametrize("shared", [1, 2])
def test_npu_by_hand(four: Ranks, shared: int, soc: str) -> None:
    for rank, (out, y) in enumerate(four.run(npu, shared, NOTHING, soc)):
        rows, _, assist, counts, ends, *_ = out
        triples, room = TRIPLES[shared][rank], ROOM[shared][rank]
        assert column(rows) == [value(t) for t in triples] + [None] * (room - len(triples))
        assert assist.shape == (128 * room,)
        assert assist[: 3 * len(triples)].reshape(-1, 3).tolist() == triples
        assert (assist[3 * len(triples) :] == LOWEST).all()
        assert counts.tolist() == COUNTS[shared][rank]
        assert ends.tolist() == ENDS[shared][rank]
        assert column(y) == results(rank, shared)


def test_npu_masks(four: Ranks) -> None:
    """A token of which no pair is sent goes to no shared expert; one of which some are goes to all."""
    prefix = torch.tensor([True, False])
    pairs = torch.tensor([[False, False], [True, False]])
    masks: list[dict[str, Any]] = [{"x_active_mask": prefix}, {}, {}, {"x_active_mask": pairs}]
    sent = [prefix[:, None].expand(2, 2), None, None, pairs]
    answers = four.run(npu, 2, masks)
    for rank in (0, 1):
        expected = [t for t in TWO[rank] if t[:2] not in ([0, 1], [3, 0])]
        assert column(answers[rank][0][0]) == [value(t) for t in expected] + [None] * 2
        assert answers[rank][0][3].tolist() == [6]
        assert answers[rank][0][4].tolist() == [1, 3, 5, 6]
    for rank, (_, y) in enumerate(answers):
        assert column(y) == results(rank, 2, sent[rank])


def test_npu_int8_with_smooth_scales_of_shared_experts_first(four: Ranks) -> None:
    smooth = torch.arange(2.0, 8.0).unsqueeze(1).expand(6, H).contiguous()  # shared 0, shared 1, experts 0 to 3
    given: dict[str, Any] = {"quant_mode": 2, "scales": smooth}
    own = [[2.0], [3.0], [4.0, 5.0], [6.0, 7.0]]
    for rank, (out, _) in enumerate(four.run(npu, 2, [given] * 4)):
        rows, scale, _, counts, *_ = out
        used = int(counts.sum())
        assert (rows[:used] == 127).all() and (rows[used:] == -128).all()
        expected = torch.tensor([value(t) for t in TWO[rank]]) * torch.tensor(own[rank]).repeat_interleave(counts)
        torch.testing.assert_close(scale[:used], expected / 127)
        assert scale[used:].isnan().all()
    for status, text in four.run(npu, 2, [{"quant_mode": 2, "scales": smooth[:4].contiguous()}] * 4):
        assert (status, "mc2.scales_rows" in text or "scales_rows is 4" in text) == ("refused", True)


def test_npu_int8_comes_back(four: Ranks) -> None:
    for rank, (_, y) in enumerate(four.run(npu, 1, [{"quant_mode": 2}] * 4)):
        for found, expected in zip(column(y), results(rank, 1), strict=True):
            assert abs(found - expected) <= 0.02 * expected


def test_npu_a_rank_with_fewer_tokens_needs_global_bs(four: Ranks) -> None:
    short: dict[str, Any] = {"x": tokens_of(1, 1), "expert_ids": ids_of(1)[:1], "expert_scales": None}
    with_bound = [{"global_bs": 8}, {**short, "global_bs": 8}, {"global_bs": 8}, {"global_bs": 8}]
    out = four.run(short_rank, with_bound)
    assert column(out[1][0]) == [11, 31, 32, None], "room is from global_bs, not from this rank's T"
    for status, text in four.run(short_rank, [{}, short, {}, {}]):
        assert (status, "tokens of the ranks are [2, 1, 2, 2] while global_bs is 0" in text) == ("refused", True)


def short_rank(rank: int, by_rank: list[dict[str, Any]]) -> Any:
    return call(DISPATCH, rank, {"x": tokens_of(rank, T), "shared_expert_num": 1, **by_rank[rank]})


def meta_shapes(rank: int, changes: dict[str, Any]) -> Any:
    arguments = {"x": tokens_of(rank, T), "expert_ids": ids_of(rank), "shared_expert_rank_num": 2, **changes}
    on_cpu = call(DISPATCH, rank, arguments)
    meta = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    fake = torch.ops.npu.npu_moe_distribute_dispatch_v2(
        **meta, group_ep="", ep_world_size=4, ep_rank_id=rank, moe_expert_num=E
    )
    return [[(tuple(t.shape), t.dtype) for t in out] for out in (on_cpu, fake)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shared_expert_num": 2},
        {"shared_expert_num": 2, "global_bs": 24},
        {"shared_expert_rank_num": 3, "quant_mode": 2},
    ],
)
def test_npu_shapes_are_those_of_the_meta_function(four: Ranks, changes: dict[str, Any]) -> None:
    for on_cpu, meta in four.run(meta_shapes, changes):
        assert on_cpu == meta


# -------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "soc", "code"),
    [
        ({}, "A2", "mc2.shared_expert_ranks"),
        ({"shared_expert_num": 3}, "A3", "mc2.shared_expert_ranks"),
        ({"shared_expert_rank_num": 4}, "A3", "mc2.shared_expert_ranks"),
        ({"shared_expert_num": 0}, "A3", "mc2.shared_experts"),
        ({"moe_expert_num": 5}, "A3", "mc2.experts_divisible"),
        ({"comm_alg": "hierarchy"}, "A3", "mc2.shared_expert_ranks"),
    ],
)
def test_npu_refuses(four: Ranks, changes: dict[str, Any], soc: str, code: str) -> None:
    given = {"shared_expert_num": 1, **changes}
    for status, text in four.run(npu, given["shared_expert_num"], [given] * 4, soc):
        assert (status, code in text) == ("refused", True), text


def test_npu_ranks_must_agree_on_shared_ranks(four: Ranks) -> None:
    for status, text in four.run(npu, 1, [{}, {}, {}, {"shared_expert_rank_num": 3}]):
        assert (status, "shared_expert_rank_num is [2, 2, 2, 3] on the ranks" in text) == ("refused", True)


def test_npu_combine_takes_no_shared_expert_x_beside_shared_ranks(four: Ranks) -> None:
    shared = {"shared_expert_x": torch.ones(T, H, dtype=torch.bfloat16)}
    for _, (status, text) in four.run(npu, 1, NOTHING, "A3", (-1, shared)):
        assert (status, "mc2.shared_expert_x" in text) == ("refused", True)


@pytest.mark.parametrize(("rank", "k"), [(0, 0), (0, 3), (2, 2)])
def test_npu_combine_refuses_rows_of_the_other_kind(four: Ranks, rank: int, k: int) -> None:
    """Rank 0 holds shared expert 0 and sends back choice K only; rank 2 sends back choices of routed experts."""
    room = ROOM[2][rank]
    assist = torch.full((128 * room,), LOWEST, dtype=torch.int32)
    triples = torch.tensor(TWO[rank])
    triples[0, 2] = k
    assist[: triples.numel()] = triples.flatten()
    answers = four.run(npu, 2, NOTHING, "A3", (rank, {"assist_info_for_combine": assist}))
    assert all(status == "refused" for _, (status, _) in answers)
    assert any("assist_info_for_combine" in text or "which holds its expert" in text for _, (_, text) in answers)


def test_npu_combine_needs_as_many_rows_as_a_shared_rank_has_room_for(four: Ranks) -> None:
    short = {"expand_x": torch.zeros(ROOM[2][0] - 1, H, dtype=torch.bfloat16)}
    for _, (status, text) in four.run(npu, 2, NOTHING, "A3", (0, short)):
        assert status == "refused"
        assert "mc2.rows" in text or "rank [0] of the group refused" in text
