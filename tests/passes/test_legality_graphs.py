"""Verdicts on graphs that are built directly, in forms that our own layers do not trace to."""

import sys

import pytest
import torch
from graph_build import build
from graph_cases import BlockCase, GraphCase

from moe_lowering import Deployment, MoeLowering
from moe_lowering.passes.run import graph_run
from moe_lowering.passes.run import messages as run_messages
from moe_lowering.passes.token_ranges import known_range
from moe_lowering.passes.verifier import VerificationError, repropagate
from moe_lowering.report.records import BlockReport

DEPLOYMENT = Deployment(
    ep_size=2, ep_rank=0, ep_group="ep", mc2_group="mc2", hccl_buffer_mb=1024, weight_format="nz",
    providers=(("vllm_ascend", "0.23.0"),),
)  # fmt: skip
CASE = GraphCase(DEPLOYMENT, (BlockCase(6, 2, 32),), hidden=1024, dtype=torch.bfloat16, symbolic=(False,))


def lowered(case: GraphCase, comm: str = "fused_mc2") -> BlockReport:
    lowering = MoeLowering(case.deployment, comm)
    lowering(build(case).gm)
    return lowering.reports[-1].blocks[0]


def test_the_matrix_of_an_only_expert_is_refused() -> None:
    """A list of one tensor would be taken for a stack; the judge says so, beside that one expert is too few."""
    for as_list in [(True, True), (True, False), (False, True)]:
        block = lowered(CASE.replace(blocks=(BlockCase(2, 2, 32, as_list=as_list),)))
        codes = {v.code for v in block.verdicts["fused_mc2"].violations}
        mixed = {"fused.weight_forms"} if as_list[0] != as_list[1] else set()
        assert codes == {"fused.single_list", "fused.local_experts"} | mixed, as_list
    assert lowered(CASE).comm == "fused_mc2"
    three = BlockCase(6, 2, 32, as_list=(True, True))
    assert lowered(CASE.replace(blocks=(three,))).comm == "fused_mc2"


def test_weights_with_a_symbolic_width_are_lowered() -> None:
    """Whether they are contiguous is not known of the call, and not broken by that."""
    block = lowered(CASE.replace(symbolic_hidden=True))
    assert block.comm == "fused_mc2", block.reason


def test_equal_splits_want_a_bound_for_tokens_that_depend_on_data() -> None:
    """The judge says so, not an undone rewrite; a size that is an input of the graph is fine, and so is a bound."""
    unbacked = CASE.replace(sizes="unbacked", symbolic=(True,))
    block = lowered(unbacked, "alltoall")
    assert {v.code for v in block.verdicts["alltoall"].violations} == {"alltoall.data_dependent"}
    assert lowered(unbacked.replace(sizes="dynamic"), "alltoall").comm == "alltoall"
    bounded = DEPLOYMENT.replace(max_tokens=64, equal_tokens=False)
    assert lowered(unbacked.replace(deployment=bounded), "alltoall").comm == "alltoall"


def test_mc2_wants_to_know_a_bounded_token_count() -> None:
    """torch_npu's meta function compares T with rows of the bound, which a size that depends on data does not answer."""
    bounded = DEPLOYMENT.replace(max_tokens=64, equal_tokens=False)
    unbacked = CASE.replace(deployment=bounded, sizes="unbacked", symbolic=(True,), bounds=(2, None))
    block = lowered(unbacked, "mc2")
    assert {v.code for v in block.verdicts["mc2"].violations} == {"mc2.data_dependent"} and "undone" not in block.reason
    assert lowered(unbacked.replace(sizes="dynamic"), "mc2").comm == "mc2"


def test_one_row_is_not_taken_for_one_token() -> None:
    """Scales of rows, whose number happens to be this rank's T, which other ranks do not have."""
    alone = Deployment(max_tokens=64, min_tokens=0, equal_tokens=False, weight_format="nz")
    block = BlockCase(4, 1, 8, quantisation="w8a8")
    report = lowered(CASE.replace(deployment=alone, blocks=(block,), lead=(1,), hidden=16), "allgather")
    assert report.comm == "allgather", report.reason


def test_a_share_of_one_token_in_a_strict_range() -> None:
    """Metadata of a share asks whether it is 1; in a strict range that guard would fail the compile."""
    shared = DEPLOYMENT.replace(tp_size=2, tp_group="tp")
    case = CASE.replace(deployment=shared, sizes="strict", symbolic=(True,), bounds=(2, 64))
    block = lowered(case, "allgather")
    assert {v.code for v in block.verdicts["allgather"].violations} == {"block.tp_share"}
    assert lowered(case.replace(bounds=(3, 64)), "allgather").comm == "allgather"
    assert lowered(case.replace(sizes="dynamic"), "allgather").comm == "allgather"
    forbidden = shared.replace(guards="forbid")  # no guard of the pass's own; torch's costs one more graph
    assert lowered(case.replace(sizes="dynamic", deployment=forbidden), "allgather").comm == "allgather"


@pytest.mark.parametrize(("tokens", "low", "high"), [(4, 2, 4), (3, 2, 4), (5, 5, None), (9, 5, None)])
@pytest.mark.parametrize(("comm", "change"), [
    ("allgather", {}), ("allgather", {"guards": "forbid"}), ("alltoall", {}),
    ("allgather", {"equal_tokens": False, "max_tokens": 64}), ("mc2", {"equal_tokens": False, "max_tokens": 64}),
], ids=str)  # fmt: skip
def test_a_graph_serves_one_side_of_a_share_of_one(comm, change, tokens, low, high) -> None:
    """torch guards on whether a share is 1; without guards, from a cache, the graph must refuse the other side itself."""
    where = Deployment(
        ep_size=4,
        ep_rank=0,
        ep_group="ep",
        mc2_group="mc2",
        tp_size=4,
        tp_rank=0,
        tp_group="tp",
        hccl_buffer_mb=1024,
        **change,
    )
    block = BlockCase(32, 2, 32)
    built = build(CASE.replace(deployment=where, blocks=(block,), lead=(tokens,), sizes="dynamic", symbolic=(True,)))
    lowering = MoeLowering(where, comm)
    lowering(built.gm)
    assert lowering.reports[-1].blocks[0].comm == comm, lowering.reports[-1].blocks[0].reason
    op = torch.ops.moe_lowering.assert_tokens.default
    (assertion,) = built.gm.graph.find_nodes(op="call_function", target=op)
    declared = change.get("max_tokens")
    assert assertion.args[1:] == (1 if declared and high else low, high or declared or sys.maxsize)
    values = [node.meta["val"] for node in built.gm.graph.find_nodes(op="placeholder")]
    size = next(v.shape[0] for v in values if isinstance(v, torch.Tensor) and isinstance(v.shape[0], torch.SymInt))
    asked = known_range(size)
    assert (asked.high == 4) if high else (asked.low == 5), "dynamo is asked for the same"


@pytest.mark.parametrize(("tokens", "dynamic"), [(2, True), (3, True), (4, True), (5, True), (3, False)])
def test_every_token_count_is_lowered_alike_where_a_share_became_one(tokens, dynamic) -> None:
    """torch writes 1 for ceil(T / 4) once it has guarded so, and metadata that is older the expression: both are the share."""
    where = Deployment(
        ep_size=4,
        ep_rank=0,
        ep_group="ep",
        tp_size=4,
        tp_rank=0,
        tp_group="tp",
        equal_tokens=False,
        max_tokens=64,
        min_tokens=1,
    )
    block = BlockCase(16, 4, 32, mask=True)
    sizes = {"sizes": "dynamic", "symbolic": (True,)} if dynamic else {}
    case = CASE.replace(deployment=where, blocks=(block,), lead=(tokens,), **sizes)
    for comm in ("allgather", "alltoall"):
        report = lowered(case, comm)
        assert report.comm == comm, report.reason


def test_a_rank_whose_rewrite_was_undone_does_not_run_beside_the_others(monkeypatch) -> None:
    """With another T on each rank the others may have lowered the block. With equal T all of them left it."""

    def planted(*_: object) -> None:
        raise VerificationError("planted")

    monkeypatch.setattr(graph_run, "same_value", planted)
    op = torch.ops.moe_lowering.assert_tokens.default
    for equal in (True, False):
        where = DEPLOYMENT.replace(equal_tokens=equal, max_tokens=64)
        built = build(CASE.replace(deployment=where, lead=(7,)))
        lowering = MoeLowering(where, "allgather")
        lowering(built.gm)
        block = lowering.reports[-1].blocks[0]
        assert block.comm is None and "rewrite undone: VerificationError: planted" in block.reason
        stops = built.gm.graph.find_nodes(op="call_function", target=op)
        assert [stop.args[1:] for stop in stops] == ([] if equal else [(0, -1)])
        assert ("the graph refuses to run" in block.reason) != equal


def test_a_block_without_names_for_its_sizes_is_lowered_all_the_same(monkeypatch) -> None:
    def planted(*_: object) -> None:
        raise KeyError("planted")

    monkeypatch.setattr(run_messages, "dimension_names", planted)
    report = lowered(CASE.replace(lead=(7,), sizes="dynamic", symbolic=(True,)), "allgather")
    assert report.comm == "allgather" and "npu.npu_grouped_matmul" in report.ops_after


def test_a_strict_range_of_one_rank_is_no_part_of_what_all_decide() -> None:
    """With unequal T the verdicts are those of a rank without the range; this rank's graph refuses to run instead."""
    unequal = DEPLOYMENT.replace(tp_size=2, tp_group="tp", equal_tokens=False, max_tokens=64)
    case = CASE.replace(deployment=unequal, lead=(7,))
    elsewhere = lowered(case, "allgather")
    built = build(case.replace(sizes="strict", symbolic=(True,), bounds=(2, 64)))
    lowering = MoeLowering(unequal, "allgather")
    lowering(built.gm)
    lowering(built.gm)  # once more changes nothing
    here = lowering.reports[0].blocks[0]
    assert here.verdicts == elsewhere.verdicts and elsewhere.comm == "allgather"
    assert here.comm is None and "[block.tp_share]" in here.reason
    op = torch.ops.moe_lowering.assert_tokens.default
    (assertion,) = built.gm.graph.find_nodes(op="call_function", target=op)
    with pytest.raises(RuntimeError, match="T is 7, but this graph must not run"):
        op(torch.zeros(7, 16), *assertion.args[1:])
    wide = lowered(case.replace(sizes="strict", symbolic=(True,), bounds=(3, 64)), "allgather")
    assert wide.comm == "allgather", wide.reason


def test_views_of_equal_blocks_keep_their_dtype() -> None:
    """The second of two equal blocks gets copies of the first one's values; w4a8 reads its scales as int32."""
    block = BlockCase(16, 2, 512, quantisation="w4a8")
    case = CASE.replace(deployment=DEPLOYMENT.replace(max_tokens=512), blocks=(block, block))
    built = build(case)
    lowering = MoeLowering(case.deployment, "allgather")
    lowering(built.gm)
    assert [block.comm for block in lowering.reports[-1].blocks] == ["allgather"] * 2
    repropagate(built.gm)
