"""``Deployment(unpermute_operator="finalize_routing")``: what is emitted, what is refused, and what stays as it was.

Numbers on real ranks: test_matrix.py, test_lowering_ranks.py; undefined rows: test_undefined_rows.py; GE mode:
test_torchair_combine.py, test_torchair_conversion.py.
"""

from __future__ import annotations

import pytest
import torch
from graph_cases import BlockCase, GraphCase
from graph_checks import lines, lower
from test_legality import BASE

from moe_lowering import Deployment, MoeLowering, testing
from moe_lowering.passes.verifier import repropagate
from moe_lowering.vocabulary import UNPERMUTE_OPERATORS

npu, aten = torch.ops.npu, torch.ops.aten
FINALIZE = (("unpermute_operator", "finalize_routing"),)
OURS = BASE.but(deployment=FINALIZE)
WIDE = {"experts": 8, "intermediate": 16, "ep_size": 2}

# (code, implementation, refused, accepted): one value differs
TWINS = {
    "float16": ("finalize.float16", "allgather", OURS.but(dtype=torch.float16), OURS.but(dtype=torch.bfloat16)),
    "float16, AllToAll": ("finalize.float16", "alltoall", OURS.but(dtype=torch.float16), OURS.but(dtype=torch.float32)),
    "float16 as it was": ("finalize.float16", "allgather", OURS.but(dtype=torch.float16), BASE.but(dtype=torch.float16)),
    "no token": ("finalize.empty", "allgather", OURS.but(tokens=0), OURS.but(tokens=1)),
    "no token, AllToAll": ("finalize.empty", "alltoall", OURS.but(tokens=0), BASE.but(tokens=0)),
    "310P": (
        "allgather.soc", "allgather", OURS.but(deployment=(*FINALIZE, ("soc", "310P"))),
        OURS.but(deployment=(*FINALIZE, ("soc", "A5"))),
    ),
    "4 rows of a wide token": (
        "finalize.wide_rows", "allgather", OURS.but(hidden=9792, **WIDE), OURS.but(hidden=9792, top_k=2, **WIDE),
    ),
    "a wide token": ("finalize.wide_rows", "alltoall", OURS.but(hidden=9792, **WIDE), OURS.but(hidden=9776, **WIDE)),
    # by row it breaks finalize.experts, and the verdict is that of the form before it
    "fewer buffers than rows": (
        "alltoall.max_rows", "alltoall", OURS.but(ep_size=2, deployment=(*FINALIZE, ("max_rows", 1))),
        OURS.but(ep_size=2, deployment=(*FINALIZE, ("max_rows", 2))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TWINS)
def test_what_it_does_not_take_is_refused(name: str) -> None:
    code, comm, refused, accepted = TWINS[name]
    lowered = refused.judge(comm=comm, policy="fixed")
    testing.assert_refused(lowered, code=code, comm=comm)
    assert lowered.ops_after == lowered.ops_before
    testing.assert_lowered(accepted.judge(comm=comm), comm=comm, blocks=1)


class WithZeroExperts(torch.nn.Module):
    """Six choices of a token among two experts of two ranks and six that give nothing."""

    def __init__(self, deployment: Deployment) -> None:
        super().__init__()
        self.deployment = deployment
        self.w13 = torch.nn.Parameter(torch.empty(1, 256, 128, dtype=torch.bfloat16), requires_grad=False)
        self.w2 = torch.nn.Parameter(torch.empty(1, 64, 256, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        ops, place = torch.ops.moe_lowering, self.deployment
        groups = (2, place.ep_group, 2, place.tp_group, 1, place.token_bound)
        rows, scale, counts, handle = ops.dispatch(x, None, ids, None, *groups, 0, 0, 1, False, None, 6)
        y = ops.grouped_mlp(rows, scale, counts, [self.w13], [self.w2], [], [], "swiglu", 0.0, 1.702, False)
        return ops.combine(y, weights, ids, handle, None, *groups, 0, 1, 6)


@pytest.mark.parametrize("comm", ["allgather", "alltoall"])
def test_a_token_has_no_more_slots_than_there_are_rows(comm: str) -> None:
    """Only zero experts can make that so: 2 * T rows of two ranks' tokens, and six slots of each. It is said at first."""

    def lowered(operator: str, tokens: int) -> testing.Lowered:
        with testing.fake_deployment(ep_size=2, unpermute_operator=operator) as deployment:
            with testing.fake_tensors():
                x, weights = torch.empty(tokens, 256, dtype=torch.bfloat16), torch.empty(tokens, 6)
                model, ids = WithZeroExperts(deployment), torch.empty(tokens, 6, dtype=torch.int32)
            return testing.lower_graph(model, x, weights, ids, deployment=deployment, comm=comm, policy="fixed")

    testing.assert_refused(lowered("finalize_routing", 2), comm=comm, code="finalize.experts")
    testing.assert_lowered(lowered("finalize_routing", 3), comm=comm, blocks=1)
    testing.assert_lowered(lowered("token_unpermute", 2), comm=comm, blocks=1)


def test_the_advice_is_what_helps() -> None:
    verdict = OURS.but(dtype=torch.float16).judge(comm="allgather").report.blocks[0].verdicts["allgather"]
    (broken,) = verdict.violations
    assert broken.advice.endswith("or leave Deployment.unpermute_operator at token_unpermute")


def test_an_unknown_word_is_refused_and_the_word_is_part_of_what_ranks_agree_on() -> None:
    with pytest.raises(
        ValueError, match="unpermute_operator is 'unpermute'; accepted: token_unpermute, finalize_routing"
    ):
        Deployment(unpermute_operator="unpermute")
    assert Deployment().unpermute_operator == "token_unpermute" == UNPERMUTE_OPERATORS[0]
    assert len({Deployment(unpermute_operator=name).digest() for name in UNPERMUTE_OPERATORS}) == 2


# ------------------------------------------------------------------------------------------------------ what is emitted

GROUPS = {"ep_size": 8, "ep_rank": 1, "ep_group": "ep", "mc2_group": "mc2", "installed": ()}
# form, what the deployment has beside, what the graph has
EMITTED = {
    "AllGather": ("allgather", {}, {}),
    "AllGather, any T": ("allgather", {}, {"sizes": "dynamic", "bounds": (2, 64)}),
    "AllGather, strict": ("allgather", {}, {"sizes": "strict", "bounds": (2, 64)}),
    "AllGather, GE": ("allgather", {"mode": "ge"}, {"sizes": "dynamic", "bounds": (2, 64)}),
    "AllGather, unequal T": ("allgather", {"equal_tokens": False, "max_tokens": 48, "min_tokens": 0}, {}),
    "AllGather, few experts": ("allgather", {}, {"experts": 16, "sizes": "dynamic", "bounds": (2, 64)}),
    "AllToAll": ("alltoall", {}, {}),
    "AllToAll, strict": ("alltoall", {}, {"sizes": "strict", "bounds": (2, 64)}),
    "AllToAll, TP, any T": (
        "alltoall", {"tp_size": 2, "tp_rank": 1, "tp_group": "tp"}, {"sizes": "dynamic", "bounds": (4, 64)},
    ),
    "AllToAll by row": ("alltoall", {"max_rows": 8}, {"sizes": "strict", "bounds": (2, 64)}),
}  # fmt: skip


def case_of(name: str, **changes: object) -> GraphCase:
    comm, fields, rest = EMITTED[name]
    experts = rest.get("experts", 64)
    graph = {"lead": (5,), "hidden": 256, "dtype": torch.bfloat16, **{k: v for k, v in rest.items() if k != "experts"}}
    deployment = Deployment(**{**GROUPS, "unpermute_operator": "finalize_routing", **fields, **changes})
    return GraphCase(deployment, (BlockCase(experts, 4, 64, mask=True),) * 2, comm=comm, policy="fixed", **graph)


@pytest.mark.parametrize("name", EMITTED)
def test_one_operator_reads_the_row_index_as_it_is(name: str) -> None:
    """No row is written and no index changed; no guard that excludes a T (``graph_checks.lower``); a second run changes
    nothing."""
    case = case_of(name)
    lowered = lower(case)
    graph = lowered.built.gm.graph
    assert set(lowered.comms.values()) == {case.comm}
    nodes = graph.find_nodes(op="call_function", target=npu.npu_moe_finalize_routing.default)
    assert len(nodes) == 2 and not graph.find_nodes(op="call_function", target=npu.npu_moe_token_unpermute.default)
    for node in nodes:
        rows, *_, weights, index, _ids, mode = node.args
        assert mode == 3 and rows.target is aten.unsqueeze.default and rows.args[1] == 1
        shape = rows.meta["val"].shape
        assert (
            len(shape) == 3 and shape[1] == 1 and weights.meta["val"].dtype == rows.meta["val"].dtype == torch.bfloat16
        )
        cast_here = weights.target is aten._to_copy.default
        assert cast_here == ("by row" in name), "others are cast before they are copied to every rank"
        from_routing = getattr(index.target, "__name__", "") == "getitem"
        assert from_routing or "by row" in name, "its places are worked out, and none is -1"
    for target in (aten.masked_fill_.Scalar, aten.fill_.Scalar, aten.remainder.Scalar, aten.masked_fill.Scalar):
        assert not graph.find_nodes(op="call_function", target=target), target
    repropagate(lowered.built.gm)
    before = lines(graph)
    MoeLowering(case.deployment, case.comm, policy="fixed")(lowered.built.gm)
    assert [line for line in lines(graph) if "assert_agreement" not in str(line)] == [
        line for line in before if "assert_agreement" not in str(line)
    ]


def test_no_row_stands_for_none() -> None:
    """With fewer experts on a rank than choices there is no spare row; its twin has one for each block."""
    sizes = {}
    for operator, target in (
        ("finalize_routing", npu.npu_moe_finalize_routing),
        ("token_unpermute", npu.npu_moe_token_unpermute),
    ):
        case = case_of("AllGather, few experts", unpermute_operator=operator).replace(sizes="static", bounds=(2, None))
        nodes = lower(case).built.gm.graph.find_nodes(op="call_function", target=target.default)
        sizes[operator] = [node.args[0].meta["val"].shape[0] for node in nodes]
    assert sizes == {"finalize_routing": [80, 80], "token_unpermute": [81, 81]}, "8 ranks * 5 tokens * 2 experts"


def test_a_graph_that_may_have_no_token_is_not_lowered() -> None:
    """T that only the data knows may be 0: refused, as its twin with a bound of tokens on every rank is not."""
    case = case_of("AllGather").replace(sizes="unbacked", bounds=(0, 64))
    assert set(lower(case).comms.values()) == {None}
    padded = case_of("AllGather, unequal T").replace(sizes="unbacked", bounds=(0, 48))
    assert set(lower(padded).comms.values()) == {"allgather"}


def test_exact_alltoall_is_as_it_was() -> None:
    """It is one operator, in which nothing is chosen."""
    fields = {"capture": False, "unpermute_operator": "finalize_routing"}
    lowered = BASE.but(deployment=tuple(fields.items()), dtype=torch.bfloat16).judge(comm="alltoall")
    testing.assert_lowered(lowered, comm="alltoall", ops=["moe_lowering.alltoall_experts"])
