"""What ranks are told when they differ: the table of docs/ranks.md, each row on real processes; and what may differ."""

from pathlib import Path

import agreement_jobs
import pytest
import rank_jobs
from rank_pools import Ranks

DOCUMENTED = Path(__file__).parents[2] / "docs" / "ranks.md"
# row of the table: what rank 1 changes, and what both ranks then say of it
DIFFERENT = {
    "top-k": ({"top_k": 2}, "top_k is 2, on rank 0 3"),
    "hidden size": ({"hidden": 2048}, "hidden is 2048, on rank 0 1024"),
    "intermediate size": ({"intermediate": 256}, "intermediate is 256, on rank 0 128"),
    "number of experts": ({"experts": 24}, "experts is 24, on rank 0 12"),
    "dtype": ({"dtype": "float16"}, "dtype is 'float16', on rank 0 'bfloat16'"),
    "activation": ({"activation": "gelu"}, "activation is 'gelu', on rank 0 'swiglu'"),
    "a mask on one rank": ({"mask": True}, "has_mask is True, on rank 0 False"),
    "layout of the weights": ({"transposed": True}, "weights_contiguous is False, on rank 0 True; "),
    "T, where it was declared equal": ({"tokens": 8}, "T is 8, on rank 0 6, and Deployment.equal_tokens says"),
    "number of MoE layers": ({"layers": 2}, "the graph has 2 MoE blocks that exchange tokens, on rank 0 1"),
    "the package's code": ({"breaks": "code"}, "moe_lowering's code differs: its digest is 'another', on rank 0 "),
    "a library of operators": ({"breaks": "library"}, "custom::npu_swiglu_clip_quant is not loaded, on rank 0 loaded"),
    "the version of torch_npu": ({"breaks": "torch_npu"}, ", torch_npu 2.99.0, on rank 0 "),
    "comparison of every run": ({"breaks": "every run"}, "MOE_LOWERING_COMPARE_EVERY_RUN is set, on rank 0 not set"),
    "a block left generic": (
        {"breaks": "rewrite"},
        "implementation is 'none: left generic', on rank 0 'fused_mc2 (dispatch_ffn_combine)'",
    ),
}


@pytest.fixture(scope="module")
def pair():
    """Collectives wait 30 s: who differs is told long before."""
    with Ranks(2, setup=rank_jobs.setup, collective_timeout=30) as ranks:
        yield ranks


@pytest.mark.parametrize(("changes", "said"), DIFFERENT.values(), ids=DIFFERENT)
def test_both_ranks_are_told_what_differs_before_the_first_exchange(pair, changes, said):
    # of a deployment on which they have not agreed yet
    fields = {"max_tokens": 32 + [*agreement_jobs.BREAKS].index(changes["breaks"])} if "breaks" in changes else {}
    for answer in pair.run(agreement_jobs.first_run, {1: changes}, "auto", fields):
        assert isinstance(answer, str) and answer.startswith("ranks disagree with rank 0:\n  rank 1: "), answer
        assert said in answer


def test_the_same_blocks_run(pair):
    """The twin of all of them, also after every error above: no rank has entered an exchange."""
    assert pair.run(agreement_jobs.first_run, {}) == [["fused_mc2"]] * 2


SAME = [
    ({"load": True}, "allgather", {}),
    ({"transposed": True}, "allgather", {}),
    ({"mask": True}, "alltoall", {"capture": False}),  # exact splits
    ({"mask": True}, "mc2", {}),
]


@pytest.mark.parametrize(("changes", "comm", "fields"), SAME, ids=str)
def test_what_changes_no_decision_and_no_exchange_may_differ(pair, changes, comm, fields):
    """One rank logs its experts' load, holds its weights otherwise, or has padding: both decide and exchange the same."""
    assert pair.run(agreement_jobs.run_beside_eager, {1: changes}, comm, fields) == [([comm], True)] * 2


def test_a_mask_on_one_rank_is_no_difference_with_buffers_of_rows(pair):
    """6 tokens to 3 experts each: 17 lines are fewer than one rank may have for another, so that rows are exchanged."""
    answers = pair.run(agreement_jobs.first_run, {1: {"mask": True}}, "alltoall", {"max_rows": 17})
    assert answers == [["alltoall"]] * 2


@pytest.mark.parametrize(("comm", "fields"), [("allgather", {}), ("alltoall", {"capture": True})], ids=str)
def test_a_mask_on_one_rank_differs_where_the_decision_is_the_same_too(pair, comm, fields):
    """AllGather and static AllToAll write masked ids as experts past the last one: a rank without a mask would not expect
    them."""
    changes = {0: {"tokens": 7}, 1: {"tokens": 7, "mask": True}}  # a T on which they have not agreed yet
    for answer in pair.run(agreement_jobs.first_run, changes, comm, fields):
        assert isinstance(answer, str) and "masked_rows_are_sent is True, on rank 0 False" in answer
        assert "has_mask is True, on rank 0 False" in answer


def test_unequal_tokens_are_no_difference_where_they_were_declared(pair):
    fields = {"equal_tokens": False, "max_tokens": 64}
    answers = pair.run(agreement_jobs.first_run, {1: {"tokens": 8}}, "alltoall", fields)
    assert answers == [["alltoall"]] * 2


def test_a_graph_that_refuses_to_run_tells_the_others_why(pair):
    fields = {"equal_tokens": False, "max_tokens": 32}  # on which they have not agreed yet
    other, refusing = pair.run(agreement_jobs.first_run, {1: {"tokens": 33}}, "alltoall", fields)
    assert "T is 33, but this graph was lowered for T from 1 to 32" in refusing
    assert "rank 1: combine: implementation is 'none: the graph refuses to run'" in other
    assert "T is 33 and the deployment declares 1 to 32 on every rank" in other


def test_more_options_on_one_rank_put_no_rank_out_of_step(pair):
    assert pair.run(agreement_jobs.print_options, 3, 30.0) == ["allgather"] * 2


def test_none_is_no_agreement(pair):
    """No store is read or written; the graphs run as they are."""
    assert pair.run(agreement_jobs.without_agreement, 6) == ["allgather"] * 2


def test_a_later_graph_that_differs_is_an_error_on_every_rank_within_the_timeout():
    """Rank 0 runs a graph on which both agreed, and is in its collective; rank 1 must not join it with another T."""
    with Ranks(2, setup=rank_jobs.setup, collective_timeout=5) as ranks:
        (waiting, first), (alone, second) = ranks.run(agreement_jobs.later_run, 8)
    assert alone.startswith("AgreementError: no answer from rank 0 of 2 within 5 s: it has not come to a graph"), alone
    assert alone.endswith(". This graph beside the last one on which all agreed: combine: T is 8, there 6"), alone
    assert "imed out" in waiting or "imeout" in waiting, waiting
    assert max(first, second) < 60


def test_a_rank_that_compiles_again_what_was_agreed_on_tells_one_that_waits_with_another_graph(pair):
    """Rank 1 waits for all with two layers; rank 0 has nothing to compare, and would enter a collective without it."""
    for answer in pair.run(agreement_jobs.compile_again, {"max_tokens": 60}, 2):
        assert "rank 1: the graph has 2 MoE blocks that exchange tokens, on rank 0 1" in answer, answer


def test_a_rank_that_compiles_again_alone_waits_for_nobody(pair):
    """The twin: rank 1 runs what it has."""
    assert pair.run(agreement_jobs.compile_again, {"max_tokens": 61}, 0) == [""] * 2


def test_where_every_run_is_compared_two_graphs_that_were_both_agreed_on_are_an_error(pair):
    for different, *same in pair.run(agreement_jobs.runs_of_two, [(6, 8), (6, 6), (8, 8)], {"max_tokens": 62}):
        assert "rank 1: the graph has 2 MoE blocks that exchange tokens, on rank 0 1" in different
        assert same == ["", ""]


def test_where_every_run_is_compared_each_run_is_one_round_whoever_compiles(pair):
    assert pair.run(agreement_jobs.run_often, 3) == [3, 3]


def test_every_row_is_documented():
    text = DOCUMENTED.read_text()
    assert [row for row in DIFFERENT if f"| {row} |" not in text] == []
