"""What the CPU kernels of MC2's dispatch and combine refuse: one thing changed in calls that are legal (mc2_calls.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mc2_calls import (
    IDS,
    RANKS,
    RECEIVED,
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


def ids(rows: list[list[int]], dtype: torch.dtype = torch.int32) -> dict[str, Any]:
    return {"expert_ids": torch.tensor(rows, dtype=dtype)}


MASK = {"x_active_mask": torch.tensor([True, False, True])}
ALL_PAIRS = torch.ones(3, 2, dtype=torch.bool)
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
        ({"x_active_mask": torch.ones(3, 3, dtype=torch.bool)}, "x_active_mask is (3, 3); accepted: (3, 2)"),
        ({"x_active_mask": ALL_PAIRS, **ids([[0, 0], [1, 2], [2, 3]])}, "no expert twice for one token"),
        ({"x_active_mask": ALL_PAIRS, **ids([[0, 4], [1, 2], [2, 3]])}, "expert_ids is 0 to 4; accepted: 0 to"),
        ({"x_active_mask": ALL_PAIRS[:2]}, "mc2.mask_tokens"),
        ({"x_active_mask": ALL_PAIRS, "global_bs": 6}, "mc2.mask_global_bs"),
        ({"x_active_mask": torch.ones(3)}, "mc2.mask_dtype"),
        ({"x_active_mask": torch.ones(2, dtype=torch.bool)}, "mc2.mask_tokens"),
        ({"shared_expert_rank_num": 2}, "mc2.shared_expert_ranks"),
        ({"shared_expert_rank_num": 1, "shared_expert_num": 2}, "mc2.shared_expert_ranks"),
        ({"shared_expert_rank_num": 1, "shared_expert_num": 0}, "mc2.shared_experts"),
        ({"shared_expert_num": 2}, "mc2.shared_experts"),
        ({"expert_shard_type": 1}, "mc2.expert_shard_type"),
        (
            {"zero_expert_num": 1, **ids([[0, 5], [1, 2], [2, 3]])},
            "expert_ids is 0 to 5; accepted: 0 to moe_expert_num - 1 +",
        ),
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


def test_algorithms_and_quantisation_must_agree(ranks: Ranks) -> None:
    for status, text in ranks.run(dispatch, {"comm_alg": "fullmesh_v1"}, 1):
        assert (status, "comm_alg (0 is the empty one) is [0, 2] on the ranks" in text) == ("refused", True)
    for status, text in ranks.run(combine, {"comm_quant_mode": 2}, 1):
        assert (status, "comm_quant_mode is [0, 2] on the ranks" in text) == ("refused", True)


@pytest.mark.parametrize(
    "mask", [torch.tensor([True, True, False]), torch.tensor([[True, True], [True, True], [True, False]])]
)
def test_combine_refuses_what_its_mask_leaves_out(ranks: Ranks, mask: torch.Tensor) -> None:
    first, second = ranks.run(combine, {"x_active_mask": mask}, 0)
    assert "came back 1 times; accepted: never, it is masked" in first[1]
    assert "rank [0] of the group refused" in second[1]


@pytest.mark.parametrize("soc", ["A2", "A5"])
def test_rows_travel_as_int8_on_a3_only(ranks: Ranks, soc: str) -> None:
    expand = {"expand_scales": torch.ones(A)} if soc == "A2" else {}
    code = {"A2": "mc2.comm_quant_mode", "A5": "comm_quant_mode is 2 on A5 with comm_alg ''; the CPU kernel"}[soc]
    assert code in ranks.run(combine, {"comm_quant_mode": 2, **expand}, -1, soc)[0][1]


def test_a2_refuses_other_weights_than_dispatch_took(ranks: Ranks) -> None:
    weights = [{"expert_scales": torch.full((3, 2), 0.5)}] * 2
    for answer, _ in ranks.run(dispatch_then_combine, weights, "A2", {"expert_scales": torch.full((3, 2), 0.25)}):
        assert answer[0] == "refused"
        assert ", k 0 is 0.5; accepted: its expert_scales, 0.25" in answer[1]
    for answer, _ in ranks.run(dispatch_then_combine, weights, "A2", {"expand_scales": torch.full((5,), 0.5)}):
        assert "expand_scales has 5 values; accepted: one for each of the 6 rows" in answer[1]


def test_a2_has_no_mask_of_pairs(ranks: Ranks) -> None:
    assert "mc2.mask_dims" in ranks.run(dispatch, {"x_active_mask": ALL_PAIRS, **WEIGHTS}, -1, "A2")[0][1]
