"""Symbolic token counts: proven for a range, guarded, or refused; and enforced in the graph."""

import dataclasses
import itertools
import re

import pytest
import reference
import torch
from graph_cases import BlockCase, GraphCase
from graph_checks import check_propagation, lower
from test_legality import BASE
from test_lowering import HIDDEN, Experts, compile_npugraph, compile_plain, routed

from moe_lowering import Deployment, MoE, MoeLowering, lowering_backend, testing
from moe_lowering.limits import Prover, Violation
from moe_lowering.passes import legality
from moe_lowering.passes.costs.price import Price
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.passes.operator_calls import Rules
from moe_lowering.passes.run import graph_run
from moe_lowering.passes.token_ranges import TokenRange, request_guard, widest
from moe_lowering.passes.verifier import VerificationError

FORBID = (("guards", "forbid"),)


def comm_of(lowered):
    return lowered.report.blocks[0].comm


def asserted(lowered):
    """(low, high) of the graph's assert_tokens, None when it has none."""
    found = lowered.gm.graph.find_nodes(op="call_function", target=torch.ops.moe_lowering.assert_tokens.default)
    return tuple(found[0].args[1:]) if found else None


def test_without_guards_a_limit_holds_for_the_whole_range_or_not_at_all():
    refused = BASE.but(deployment=FORBID).judge(comm="mc2", dynamic=True)
    testing.assert_refused(refused, code="mc2.tokens", comm="mc2")
    assert refused.ops_after == refused.ops_before
    bounded = BASE.but(deployment=(*FORBID, ("max_tokens", 512))).judge(comm="mc2", dynamic=True)
    testing.assert_lowered(
        bounded, comm="mc2", ops=["moe_lowering.assert_tokens", "npu.npu_moe_distribute_dispatch_v2"]
    )
    assert asserted(bounded)[1] == 512
    wide = BASE.but(deployment=(*FORBID, ("max_tokens", 513))).judge(comm="mc2", dynamic=True)
    testing.assert_refused(wide, code="mc2.tokens", comm="mc2")


@pytest.mark.parametrize(("tokens", "comm", "low", "high"), [
    (32, "mc2", 2, 512), (512, "mc2", 2, 512), (513, None, None, None), (900, None, None, None),
])  # fmt: skip
def test_with_guards_a_graph_serves_the_range_that_its_choice_is_legal_for(tokens, comm, low, high):
    lowered = BASE.but(tokens=tokens).judge(comm="mc2", dynamic=True)
    assert comm_of(lowered) == comm
    assert asserted(lowered) == (None if comm is None else (low, high))


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("guards", ["allow", "forbid"])
@pytest.mark.parametrize(("tokens", "tp"), list(itertools.product((513, 16), (2, 1))))
def test_a_compile_outside_of_the_declared_range_does_not_guard_that_it_is(tokens, tp, guards, equal):
    """T = 513 with at most 32 declared: the graph refuses to run so, and must serve the other sizes all the same."""
    most, groups = 32, {"tp_size": 2, "tp_rank": 0, "tp_group": "tp"} if tp == 2 else {}
    declared = Deployment(
        soc="A3",
        ep_size=2,
        ep_rank=0,
        ep_group="ep",
        mc2_group="mc2",
        max_tokens=most,
        guards=guards,
        equal_tokens=equal,
        **groups,
    )
    lowered = lower(GraphCase(declared, (BlockCase(16, 2, 32),), (tokens,), 1024, sizes="dynamic"))
    assert lowered.comms == {"layers.0": "allgather"} and asserted(lowered.built)[1] == most
    said = [guard.expr for guard in lowered.built.env.guards]
    assert all(guard.subs(dict.fromkeys(guard.free_symbols, most)) for guard in said), said


def test_a_guard_is_asked_for_where_the_compile_is_in_the_range():
    for tokens, expected in ((16, 1), (513, 0)):
        lowered = BASE.but(tokens=tokens).judge(comm="allgather", dynamic=True)
        inputs = [node.meta["val"] for node in lowered.gm.graph.find_nodes(op="placeholder")]
        (size,) = (value for value in inputs if isinstance(value, torch.SymInt))
        before = len(size.node.shape_env.guards)
        request_guard(size, TokenRange(2, 32))
        assert len(size.node.shape_env.guards) == before + expected


@pytest.mark.parametrize("comm", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [2, 4])
def test_equal_blocks_when_a_guard_of_the_first_makes_a_number_of_t(comm, tokens):
    """A TP rank's share of 2 tokens is 1, which torch guards on: the second block sees T as a number."""
    declared = Deployment(
        soc="A3", ep_size=2, ep_rank=0, ep_group="ep", mc2_group="mc2", tp_size=2, tp_rank=0, tp_group="tp", max_tokens=12,
        equal_tokens=False, min_tokens=1, hccl_buffer_mb=1024, weight_format="nz", providers=(("vllm_ascend", "0.23.0"),),
    )  # fmt: skip
    block = BlockCase(16, 2, 512)
    lowered = lower(
        GraphCase(declared, (block, block), (tokens,), 1024, dtype=torch.bfloat16, sizes="dynamic", comm=comm)
    )
    assert lowered.comms == dict.fromkeys(("layers.0", "layers.1"), comm), lowered.report.to_text()
    check_propagation(lowered)


def test_auto_takes_one_implementation_on_each_side_of_the_capacity():
    """Above the limit of MC2 and the fused operator AllGather is left; 16 ranks make it dearer below."""
    below = BASE.but(ep_size=16, tokens=512).judge(dynamic=True)
    above = BASE.but(ep_size=16, tokens=513).judge(dynamic=True)
    assert comm_of(below) == "fused_mc2"
    assert asserted(below)[1] == 512
    assert comm_of(above) == "allgather"
    assert asserted(above)[0] == 513


@pytest.mark.parametrize("how", ["dynamic", "marked", "two leading dimensions"])
@pytest.mark.parametrize("compiler", [compile_plain, compile_npugraph])
def test_two_compiled_graphs_across_a_boundary_and_each_is_right(monkeypatch, compiler, how):
    """The boundary is made of a limit: AllGather up to 24 tokens, refused above, so the second graph is generic."""
    limit_allgather(monkeypatch, 24)
    module, lowering = Experts(), MoeLowering(Deployment(), "allgather")
    compiled = compiler(module, lowering, dynamic=None if how == "marked" else True)
    for tokens in (8, 24, 25, 100, 17, 3, 26):
        args = routed(2, tokens // 2) if how == "two leading dimensions" else routed(tokens)
        for tensor in args if how == "marked" else ():
            torch._dynamo.mark_dynamic(tensor, 0)
        with torch.no_grad():
            reference.assert_near(compiled(*args), module.expected(*args), torch.float32)
    chosen = [report.blocks[0].comm for report in lowering.reports]
    # one graph on each side; T = 1 would get a graph of its own from dynamo
    assert set(chosen) == {"allgather", None}
    assert len(chosen) == (3 if how == "two leading dimensions" else 2)


def limit_allgather(monkeypatch, most):
    """The limit tables with one more rule: AllGather takes at most ``most`` tokens."""
    check, whole = legality.check, IMPLEMENTATIONS["allgather"]

    def extended(operator, soc, quantities, prover=None, *args, **kwargs):
        found = check(operator, soc, quantities, prover, *args, **kwargs)
        if operator == "allgather" and not (prover or Prover()).at_most(quantities["tokens"], most):
            found.append(Violation("test.tokens", operator, "", str(most), "this test", "too many tokens"))
        return found

    def rules(spec, deployment):
        fixed = whole.rules(spec, deployment)
        return Rules(fixed.operator, lambda premises: {**fixed.read(premises), "tokens": premises.tokens})

    monkeypatch.setattr(legality, "check", extended)
    monkeypatch.setitem(IMPLEMENTATIONS, "allgather", dataclasses.replace(whole, rules=rules))
    # What was kept knows no such rule
    monkeypatch.setattr(legality, "_prepare_calls", legality._prepare_calls.__wrapped__)


def strict_range(low, high, tokens, **options):
    """A layer on 16 ranks whose token count was declared with mark_dynamic(min, max)."""
    with testing.fake_deployment(ep_size=16, **options) as deployment:
        with testing.fake_tensors():
            model = MoE(1024, 512, 64, 4, deployment=deployment, dtype=torch.bfloat16)
            x = torch.empty(tokens, 1024, dtype=torch.bfloat16)
        torch._dynamo.mark_dynamic(x, 0, min=low, max=high)
        return testing.lower_graph(model, x, deployment=deployment)


def test_a_strict_range_is_never_narrowed():
    across = strict_range(2, 1024, 32)
    assert comm_of(across) == "allgather", "legal for all of it"
    assert asserted(across) is None, "what the graph knows needs no assertion"
    (note,) = across.report.blocks[0].notes
    assert "the range was not split" in note
    assert re.search(r"fused_mc2 for \d+ <= T <= 512, allgather for 513 <= T <= 1024$", note)


def test_two_disjoint_strict_ranges_take_one_implementation_each():
    assert comm_of(strict_range(2, 512, 32)) == "fused_mc2"
    assert comm_of(strict_range(513, 4096, 600)) == "allgather"


def test_a_graph_refuses_sizes_outside_its_range_when_guards_are_dropped():
    """A cache hit and a framework that owns AOT call the artefact with any size: the graph itself must refuse."""
    module = Experts()
    kept = {}

    def keep(gm, example_inputs, config):
        kept["gm"] = gm

    torch._dynamo.reset()
    lowering = MoeLowering(Deployment(max_tokens=24), "allgather", strict=True)
    with torch.no_grad():
        torch.compile(module, backend=lowering_backend(lowering, keep), fullgraph=True, dynamic=True)(*routed(8))
    gm = kept["gm"]

    def call(tokens):
        x, weights, ids = routed(tokens)
        inputs = []
        for node in gm.graph.find_nodes(op="placeholder"):
            value = node.meta["val"]
            if not isinstance(value, torch.Tensor):
                inputs.append(tokens)
            elif value.dim() == 3:
                inputs.append(module.w13 if value.shape[-1] != HIDDEN else module.w2)
            elif value.dtype == torch.int32:
                inputs.append(ids)
            else:
                inputs.append(x if value.shape[-1] == HIDDEN else weights)
        return gm(*inputs)[0], module.expected(x, weights, ids)

    with torch.no_grad():
        reference.assert_near(*call(24), torch.float32)
        with pytest.raises(RuntimeError, match="25"):
            call(25)


def test_widest_finds_the_edges():
    def choice(t):
        return "low" if t <= 100 else "high" if t <= 300 else "top"

    assert widest(choice, 50, TokenRange(2, None)) == TokenRange(2, 100)
    assert widest(choice, 100, TokenRange(2, 5000)) == TokenRange(2, 100)
    assert widest(choice, 101, TokenRange(2, 5000)) == TokenRange(101, 300)
    assert widest(choice, 301, TokenRange(2, None)) == TokenRange(301, None)
    assert widest(lambda t: "same", 7, TokenRange(0, 9)) == TokenRange(0, 9)


def test_a_range_that_the_choice_rests_on_is_enforced_even_when_dynamo_knows_it():
    """A cache hit has no guards. AllGather is legal for every size, so its graph needs none."""
    assert asserted(strict_range(2, 512, 32)) == (2, 512)
    assert asserted(strict_range(513, 4096, 600)) is None


def test_a_boundary_of_one_size_never_makes_a_constant_of_a_marked_dimension():
    """T = 513 with max_tokens = 513 is alone above MC2's limit: a guard on it would fail a real compile."""
    layer = MoE(HIDDEN, 32, 8, 2)
    lowering = MoeLowering(Deployment(max_tokens=513), cost=lambda name, load: 1.0)
    compiled = compile_plain(layer, lowering, dynamic=None)
    x = torch.randn(513, HIDDEN)
    torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        assert compiled(x).shape == x.shape


@pytest.mark.parametrize(("tokens", "marked", "lowered"), [(2, True, False), (3, True, True), (2, False, True)])
@pytest.mark.parametrize("equal", [True, False])
def test_a_share_of_one_token_never_makes_a_constant_of_a_marked_dimension(tokens, marked, lowered, equal):
    """On two TP ranks the share of T = 2 is 1, on which torch guards: it would leave no other T, and fail the compile."""
    declared = {} if equal else {"equal_tokens": False, "max_tokens": 64, "min_tokens": 2}
    with testing.fake_deployment(ep_size=4, tp_size=2, **declared) as deployment:
        model, lowering = MoE(64, 32, 8, 2, deployment=deployment), MoeLowering(deployment)
        compiled = compile_plain(model, lowering, dynamic=None if marked else True)
        x = torch.randn(tokens, 64)
        if marked:
            torch._dynamo.mark_dynamic(x, 0)
        try:
            with torch.no_grad():
                compiled(x)
        except (ValueError, RuntimeError) as error:  # a fake group carries nothing: generic operators run into nonsense
            assert not lowered and re.search("dispatch: |combine: |must not run", str(error)), error
        (block,) = lowering.reports[-1].blocks
        assert (block.comm is not None) == lowered, block.reason
        if not lowered and equal:
            assert all(comm.violations[0].code == "block.tp_share" for comm in block.verdicts.values())
        if not lowered and not equal:
            assert "[block.tp_share]" in block.reason


def test_a_block_whose_rewrite_was_undone_asks_for_no_guard_and_enforces_nothing(monkeypatch):
    """The next of equal blocks is still enforced: what the first one emitted is gone with it."""
    real, calls = graph_run.same_value, []

    def fail_once(old, new):
        calls.append(new)
        if len(calls) == 1:
            raise VerificationError("planted")
        return real(old, new)

    monkeypatch.setattr(graph_run, "same_value", fail_once)
    limit_allgather(monkeypatch, 24)
    layers = torch.nn.Sequential(*(MoE(HIDDEN, 32, 8, 2) for _ in range(2)))
    lowered = testing.lower_graph(layers, torch.randn(8, HIDDEN), deployment=Deployment(), dynamic=True)
    assert [block.comm for block in lowered.report.blocks] == [None, "allgather"]
    assert asserted(lowered) == (2, 24)


def test_fused_is_seen_on_both_sides_of_a_cost_crossover(monkeypatch):
    """The range ends where the choice does, not where two other implementations cross."""

    def price_of(name, form, spec, deployment, tokens, rates):
        crossing_at_308 = {"allgather": tokens, "mc2": 308}
        us = {**crossing_at_308, "alltoall": 2 * tokens, "fused_mc2": 1}[name]
        return Price((("memory", 1000 * us, 0.01),))

    monkeypatch.setattr("moe_lowering.passes.policy.price_of", price_of)
    for tokens in (64, 400):
        lowered = BASE.but(tokens=tokens, deployment=(("max_tokens", 512),)).judge(dynamic=True)
        assert comm_of(lowered) == "fused_mc2"
        assert asserted(lowered)[1] == 512
    assert not BASE.judge(comm="fused_mc2", dynamic=True).report.blocks[0].notes


def test_unequal_tokens_with_a_compile_outside_of_the_range():
    """The decision does not depend on the size that this rank's compile happened to start with."""
    unequal = (("equal_tokens", False), ("max_tokens", 512))
    for comm in ("allgather", "mc2", "fused_mc2"):
        for tokens in (300, 600):
            lowered = BASE.but(tokens=tokens, deployment=unequal).judge(comm=comm, dynamic=True)
            assert comm_of(lowered) == comm
            assert asserted(lowered) == (1, 512)
