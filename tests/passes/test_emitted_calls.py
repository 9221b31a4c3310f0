"""What a block is judged for is what is emitted: the same calls in the same order, with the same quantities."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from graph_build import build
from graph_cases import BlockCase, GraphCase

from moe_lowering import Deployment, MoeLowering, moe_experts, simulator, testing
from moe_lowering._versions import later_arguments
from moe_lowering.limits import check, limits_for, load, names
from moe_lowering.limits.calls import CONTEXT, OPERATORS
from moe_lowering.limits.calls.schemas import COLLECTIVES, LIBRARIES, TEXTS, complete, schema, split
from moe_lowering.matrix.forms import FORMS
from moe_lowering.passes.blocks import size_key
from moe_lowering.passes.context import call_context
from moe_lowering.passes.implementations import IMPLEMENTATIONS, fused_mc2, gathered, mc2, mlp
from moe_lowering.passes.implementations.matmul_calls import MATMUL
from moe_lowering.passes.implementations.tensor_parallel import tokens_per_rank
from moe_lowering.passes.legality import Judgement, judged_calls
from moe_lowering.passes.operator_calls import OperatorCall, Rules
from moe_lowering.passes.run import graph_run
from moe_lowering.passes.run.graph_run import GraphRun
from moe_lowering.passes.verifier import emitted_quantities
from moe_lowering.vocabulary import EXPERT_FORMATS, SOCS

simulator.enable()

# What a verdict must not rest on: how many rows a rank has for its experts, and what differs between ranks.
NOT_JUDGED = frozenset({
    "rows", "per_token_rows", "x_scale_rows", "scale_rows", "assist_length", "counts_length", "ep_rank", "expert_start",
    "expert_end",
})  # fmt: skip
# Of calls on rows: tokens are those of many ranks there, and so are rows.
OF_ROWS = frozenset({"tokens", "ids_tokens", "indices_length"})
ON_ROWS = frozenset({"npu_moe_init_routing_v2", "npu_moe_token_unpermute"})

FORM_FIELDS = {
    **{name: (form.comm, form.form, form.deployment_fields) for name, form in FORMS.items() if form.form != "exact"},
    "alltoall_buffers": ("alltoall", "buffers", FORMS["alltoall_static"].deployment_fields),
}


@dataclasses.dataclass(frozen=True)
class Situation:
    """What is particular: ``without`` are the rows of the matrix that do not exist there."""

    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    block: dict[str, Any] = dataclasses.field(default_factory=dict)
    graph: dict[str, Any] = dataclasses.field(default_factory=dict)
    without: tuple[str, ...] = ()


NO_GE = ("mega_moe",)
FUSED = ("mega_moe", "dispatch_ffn_combine", "dispatch_gmm_combine_decode")
SITUATIONS = {
    "static": Situation(),
    "symbolic": Situation(graph={"sizes": "dynamic", "bounds": (2, 64)}),
    "declared range": Situation({"equal_tokens": False, "max_tokens": 48}, without=("mega_moe",)),
    "declared range, symbolic": Situation(
        {"equal_tokens": False, "max_tokens": 48}, {}, {"sizes": "dynamic", "bounds": (2, 64)}, ("mega_moe",)
    ),
    "TP": Situation({"tp_size": 2, "tp_rank": 1, "tp_group": "tp"}, graph={"lead": (5,)}),
    "TP, symbolic": Situation(
        {"tp_size": 2, "tp_rank": 1, "tp_group": "tp"}, {}, {"sizes": "dynamic", "bounds": (2, 64)}
    ),
    "mask": Situation(block={"mask": True}),
    "GE": Situation({"mode": "ge"}, without=NO_GE),
    "finalize_routing": Situation({"unpermute_operator": "finalize_routing"}),
    "finalize_routing, TP, declared range, symbolic": Situation(
        {
            "unpermute_operator": "finalize_routing",
            "tp_size": 2,
            "tp_rank": 1,
            "tp_group": "tp",
            "equal_tokens": False,
            "max_tokens": 48,
            "mode": "ge",
        },
        {},
        {"sizes": "dynamic", "bounds": (2, 64)},
        ("mega_moe",),
    ),
    "A2": Situation({"soc": "A2"}, without=FUSED),
    "two levels": Situation({"mc2_hierarchy": True, "soc": "A2", "ep_size": 16}, without=FUSED),
    "weights in 16 bits": Situation(block={"odd": ("weights_in_16_bits",)}),
    "lists": Situation(block={"as_list": (True, True)}),
    "activation": Situation(block={"activation": "swiglu_oai", "limit": 7.0}, without=FUSED),
}


Calls = list[tuple[str, dict[str, Any]]]  # names of operators, and what their rules read


@dataclasses.dataclass(frozen=True)
class Emitted:
    """One block as it was rewritten: its calls as they were judged, and as ``limits/calls`` reads them from the nodes."""

    comm: str
    form: str
    judged: Calls
    read: Calls


def of_block(spec: Any, deployment: Deployment, decision: Any, nodes: list[Any]) -> Emitted:
    comm, judgement = decision.comm, decision.judgement
    form = IMPLEMENTATIONS[comm].form(judgement.form(comm), deployment)
    calls = [each for each in judged_calls(comm, form, spec, deployment) if isinstance(each, OperatorCall)]
    judged = [(each.operator, judgement.quantities(each, deployment)) for each in calls]
    # T of the graph is read as T of the rules
    sizes = (
        tokens_per_rank(spec.tokens, spec),
        tokens_per_rank(judgement.tokens, spec),
    )
    every = [emitted_quantities(node, deployment, sizes, judgement.context) for node in nodes]
    read = [(each[1], each[3]) for each in every if each is not None and each[0].namespace not in COLLECTIVES]
    return Emitted(comm, form.name, judged, read)


@pytest.fixture
def emitted(monkeypatch: pytest.MonkeyPatch) -> list[Emitted]:
    """The blocks that the pass emits in a test, as they are when they are verified."""
    seen: list[Emitted] = []
    check = GraphRun._check_limits

    def note(self: Any, spec: Any, decision: Any, emit: Any) -> None:
        seen.append(of_block(spec, self.deployment, decision, emit.created))
        check(self, spec, decision, emit)

    monkeypatch.setattr(GraphRun, "_check_limits", note)
    return seen


def lowered(name: str, quantisation: str, situation: Situation) -> MoeLowering:
    """The pass after a graph of one block, in the form of that name."""
    comm, _, of_layout = FORM_FIELDS[name]
    layout = FORMS.get(name, FORMS["alltoall_static"]).layout(quantisation)
    fields = {"ep_size": 8, "ep_rank": 1, "ep_group": "ep", "mc2_group": "mc2", "installed": (), **of_layout(layout)}
    fields.update({"max_rows": 8} if name == "alltoall_buffers" else {})
    fields.update(situation.fields)
    lists = (name == "mega_moe",) * 2
    block = BlockCase(
        **{
            "experts": 64,
            "top_k": 4,
            "intermediate": 512,
            "quantisation": quantisation,
            "as_list": lists,
            **situation.block,
        }
    )
    graph = {"lead": (4,), "hidden": 1024, "dtype": torch.bfloat16, **situation.graph}
    case = GraphCase(Deployment(**fields), (block,), **graph)
    lowering = MoeLowering(case.deployment, comm, policy="fixed")
    lowering(build(case).gm)
    return lowering


def differences(one: Emitted) -> list[str]:
    """In what the calls that were judged and those that were emitted are not the same."""
    judged, read = ([name for name, _ in calls] for calls in (one.judged, one.read))
    if judged != read:
        return [f"judged {judged}, emitted {read}"]
    found = []
    for (operator, ours), (_, theirs) in zip(one.judged, one.read, strict=True):
        left_out = NOT_JUDGED | (OF_ROWS if operator in ON_ROWS else frozenset())
        for name in ours.keys() | theirs.keys():
            ours_is, theirs_is = ours.get(name), theirs.get(name)
            if ours_is is None and name in left_out:
                continue
            if name == "contiguous" and theirs_is is None:  # not known of a symbolic size without a guard
                continue
            if type(ours_is) is not type(theirs_is) or size_key(ours_is) != size_key(theirs_is):
                found.append(f"{operator}: {name} was judged as {ours_is}, emitted as {theirs_is}")
    return found


def legal(lowering: MoeLowering) -> bool:
    """Whether the one block was lowered; a block that was undone fails the test."""
    (block,) = lowering.reports[0].blocks
    assert "undone" not in block.reason, block.reason
    return block.comm is not None


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("quantisation", EXPERT_FORMATS)
def test_what_was_judged_is_what_is_emitted(quantisation: str, situation: str, emitted: list[Emitted]) -> None:
    done = []
    for name, (comm, form, _) in FORM_FIELDS.items():
        emitted.clear()
        if not legal(lowered(name, quantisation, SITUATIONS[situation])):
            assert not emitted
            continue
        (one,) = emitted
        assert (one.comm, one.form) == (comm, form), "the form that the row is about"
        assert differences(one) == []
        done.append(name)
    assert expected(quantisation, situation) <= set(done)


def expected(quantisation: str, situation: str) -> set[str]:
    """Rows that must be there, so that what was compared is something."""
    if situation == "lists" and EXPERT_FORMATS[quantisation].int8_rows:
        return set()  # gmm.quant_single_weight
    fused = situation in ("static", "TP") and quantisation in ("none", "w8a8")
    return {"allgather", "alltoall_static", "alltoall_buffers", "mc2"} | (set(FUSED) if fused else set())


def test_what_an_emitted_call_breaks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block is put back, and the report has each rule."""
    broken = check(gathered.ROUTE, "A3", {"active_num": -3, "row_idx_type": 2})
    monkeypatch.setattr(graph_run, "call_violations", lambda *_: broken)
    (block,) = lowered("allgather", "none", SITUATIONS["static"]).reports[0].blocks
    assert block.comm is None and "rewrite undone: VerificationError" in block.reason
    assert re.search(r"\[routing\.\w+\] .*; \[routing\.\w+\] ", block.reason), block.reason


@pytest.mark.parametrize("quantisation", ["none", "w8a8"])
def test_on_a_rank_beside_shared_expert_ranks(quantisation: str, emitted: list[Emitted]) -> None:
    """Every rank judges as one with routed experts does, which this one is."""
    with testing.fake_deployment(ep_size=10, ep_rank=5, shared_expert_ranks=2) as deployment, testing.fake_tensors():
        dtype = torch.bfloat16 if quantisation == "none" else torch.int8
        experts = {
            "w13": torch.empty(8, 1024, 1024, dtype=dtype), "w2": torch.empty(8, 512, 1024, dtype=dtype),
            "num_experts": 64, "quantisation": quantisation, "deployment": deployment,
        }  # fmt: skip
        if quantisation != "none":
            experts.update(w13_scale=torch.empty(8, 1024), w2_scale=torch.empty(8, 1024))
        x, routing = torch.empty(4, 1024, dtype=torch.bfloat16), torch.empty(4, 4)
        inputs = x, routing, torch.empty(4, 4, dtype=torch.int32)

        def run(*given: torch.Tensor) -> torch.Tensor:
            return moe_experts(*given, **experts)

        report = testing.lower_graph(run, *inputs, deployment=deployment, comm="mc2").report
    assert report.blocks[0].comm == "mc2", report.blocks[0].reason
    (one,) = emitted
    assert differences(one) == []
    assert one.judged[0][1]["shared_expert_rank_num"] == 2


@pytest.mark.parametrize(("row", "module", "operator", "argument", "value"), [
    ("mc2", mc2, mc2.DISPATCH, "global_bs", 8),
    ("mc2", mc2, mc2.DISPATCH, "expert_token_nums_type", 0),
    ("mc2", mc2, mc2.COMBINE, "group_ep", "other"),
    ("mc2", mc2, mc2.DISPATCH, "moe_expert_num", 72),
    ("mc2", mlp, MATMUL, "group_list_type", 0),
    ("allgather", gathered, gathered.ROUTE, "expert_tokens_num_type", 0),
    ("allgather", gathered, gathered.ROUTE, "expert_num", 128),
    ("dispatch_ffn_combine", fused_mc2, "dispatch_ffn_combine", "max_output_size", 9),
])  # fmt: skip
def test_an_argument_that_is_emitted_otherwise_is_seen(
    row: str,
    module: Any,
    operator: str,
    argument: str,
    value: Any,
    emitted: list[Emitted],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    emit_call = module.emit_call

    def otherwise(emit: Any, name: str, arguments: dict[str, Any]) -> Any:
        changed = {argument: value} if name == operator else {}
        return emit_call(emit, name, {**arguments, **changed})

    monkeypatch.setattr(module, "emit_call", otherwise)
    lowered(row, "none", SITUATIONS["static"])
    found = differences(emitted[0])
    assert any(each.startswith(operator) for each in found), found


# ------------------------------------------------------------------------------------------- what is made and what is read


def every_rules() -> dict[str, set[str]]:
    """The names of what each set of rules without an operator is given, by its name."""
    given: dict[str, set[str]] = {}
    spec, deployment, judgement = some_block()
    for name, implementation in IMPLEMENTATIONS.items():
        for form in (*implementation.forms(deployment), *implementation.ruled_out(deployment)):
            for rules in judged_calls(name, form, spec, deployment):
                if isinstance(rules, Rules):
                    given.setdefault(rules.operator, set()).update(judgement.quantities(rules, deployment))
    return given


def some_block() -> tuple[Any, Deployment, Judgement]:
    """One with everything that the context may be about."""
    seen: list[Any] = []
    whole = GraphRun._check_limits
    libraries = ("vllm_ascend", "0.23.0"), ("cann_ops_transformer", "9.2.0")
    installed = (*libraries[0], "A3"), (*libraries[1], "")  # of which builds differ, and of which they do not
    fields = {"providers": libraries, "installed": installed}
    GraphRun._check_limits = lambda run, spec, decision, emit: seen.append((spec, run.deployment, decision.judgement))  # type: ignore[method-assign]
    try:
        assert legal(lowered("allgather", "none", Situation(fields)))
    finally:
        GraphRun._check_limits = whole  # type: ignore[method-assign]
    return seen[0]


def test_every_quantity_that_is_made_is_read_and_no_other() -> None:
    """What rules without an operator are given, and what the rows under their names read."""
    given = every_rules()
    others = {"gating", "capture"}  # of a routing, and of a node
    assert given.keys() == {row.operator for row in load()} - OPERATORS - others
    for operator, made in given.items():
        read = frozenset[str]().union(*(names(operator, soc) for soc in SOCS)) - {"soc"}
        assert made == read, operator


def test_the_context_is_what_rows_of_calls_read_and_no_call_shows() -> None:
    spec, deployment, judgement = some_block()
    context = call_context(deployment, spec, judgement.premises)
    # each call has weights of its own, and readers of what is emitted give top_k
    assert context.keys() | {"weight_format", "top_k"} == CONTEXT
    read = frozenset[str]().union(*(names(operator, soc) for operator in OPERATORS for soc in SOCS))
    assert context.keys() <= read


@pytest.mark.parametrize("operator", sorted(TEXTS.keys() - LIBRARIES.keys()))
def test_schemas_are_those_of_torch_npu(operator: str) -> None:
    found = getattr(torch.ops.npu, operator).default
    expected = str(schema(operator))
    for later in later_arguments(found):  # which an older torch_npu has not
        expected = re.sub(rf", \w+\?? {later}=\w+", "", expected)
    assert expected == str(found._schema)


def test_calls_are_complete_or_refused() -> None:
    arguments = {"input": "x"}
    assert complete("npu_swiglu", arguments) == {"input": "x", "dim": -1}
    assert split("npu_swiglu", {"dim": 0, "input": "x"}) == (("x", 0), {})
    given = {name: name for name in ("x", "w13", "w2", "ids", "weights", "group", "ep_size", "max_output_size")}
    assert split("dispatch_ffn_combine", {**given, "quantisation": "w8a8"}) == (tuple(given), {"quantisation": "w8a8"})
    assert split("npu_clipped_swiglu", {"x": "x", "alpha": 1.0}) == (("x",), {"alpha": 1.0})
    with pytest.raises(TypeError, match="missing arguments \\['input'\\]"):
        complete("npu_swiglu", {"dim": 0})
    with pytest.raises(TypeError, match="unknown arguments \\['axis'\\]"):
        complete("npu_swiglu", {**arguments, "axis": 0})


def test_what_is_not_judged_is_compared_with_nothing_but_itself() -> None:
    """Rows that read a number of rows are about this call's own tensors: its verification sees them."""
    for operator in sorted(OPERATORS & TEXTS.keys()):
        for row in {row for soc in SOCS for row in limits_for(operator, soc)}:
            if "rows" in row.names and row.max is not None:
                assert row.max.names, f"{row.code} bounds the number of rows, which is not judged"
