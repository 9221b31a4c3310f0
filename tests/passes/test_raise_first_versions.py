"""Chains of older torch_npu operators: first versions of dispatch, combine and init_routing, and token_permute.

Each is found, becomes what the newer operators are, and computes the same; what differs in one thing is left, by its code.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

import npu_chain_first as first
import npu_chain_layers as chains
import npu_chain_variants as variants
import pytest
import torch
from raise_graphs import trace
from reference import relative_error

from moe_lowering import Deployment, MoeLowering, simulator, testing
from moe_lowering.backends.aot import lowering_backend
from moe_lowering.testing import ge

BOUND = {"none": 2e-2, "w8a8": 4e-2}
FORMS: dict[str, tuple[type[first.Old], dict[str, Any]]] = {
    "routing_v1": (first.FirstRouting, {}),
    "routing_v1, numbered by the router": (first.FirstRouting, {"numbering": "softmax", "shared": True}),
    "routing_v1, clamps": (first.FirstRouting, {"activation": "swiglu_clamp"}),
    "permute": (first.Permuted, {}),
    "permute, prefix sums": (first.Permuted, {"kind": 0}),
    "permute, one_hot, GEGLU": (first.Permuted, {"counting": "one_hot", "activation": "gelu_tanh"}),
    "permute, W8A8, all rows named": (first.Permuted, {"quantisation": "w8a8", "kept": lambda _: 12}),
}


@pytest.fixture(scope="module", autouse=True)
def simulated():
    simulator.enable("A3")


def alone() -> Deployment:
    return Deployment(soc="A3", installed=(), weight_format="nz")


def run(layer: Any, dynamic: bool = False) -> tuple[Any, ...]:
    """(lowered, as written, float64 reference, the report)."""
    lowering = MoeLowering(alone())
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=lowering_backend(lowering), fullgraph=True, dynamic=dynamic)
    x, ids, weights = chains.inputs(0)
    with torch.no_grad():
        chosen = layer.chosen(x) if getattr(layer, "numbering", "") == "softmax" else (ids, weights)
        ids, weights = chosen
        reference = chains.reference(layer, x, ids, weights.bfloat16())
        if layer.shared:
            reference = reference + x.double() @ layer.w_shared.double()
        return compiled(x, ids, weights), layer(x, ids, weights), reference, lowering.reports[0]


@pytest.mark.parametrize("form", FORMS)
def test_a_chain_becomes_one_of_the_newer_operators(form):
    kind, changes = FORMS[form]
    lowered, written, reference, report = run(kind(**changes))
    for result in (lowered, written):
        assert relative_error(result, reference) < BOUND[changes.get("quantisation", "none")]
    (block,) = report.blocks
    assert (block.comm, block.raised_from) == ("allgather", form.partition(",")[0]), block.reason
    assert report.foreign == () and "npu.npu_moe_init_routing_v2" in block.ops_after
    if "quantisation" not in changes and not changes.get("shared") and changes.get("activation") != "swiglu_clamp":
        assert torch.equal(lowered, written)  # the same sums in the same order


def test_of_many_sizes():
    routed = chains.Routed("none", "swiglu", route={"active_num": -1})
    for layer in (first.Permuted(), first.FirstRouting(), routed):
        lowered, written, _, report = run(layer, dynamic=True)
        assert [block.comm for block in report.blocks] == ["allgather"], report
        assert torch.equal(lowered, written)


def test_what_only_counts_for_a_chain_goes_with_it():
    for returned, left in ((None, 0), (lambda rows, places, groups, out: groups, 1)):
        layer = first.Permuted(**({} if returned is None else {"returned": returned}))
        lowered = testing.lower_graph(layer, *chains.inputs(0), deployment=alone())
        assert sum(name == "aten.histc" for name in lowered.ops_after) == left


def finished(_):
    return torch.zeros(6, dtype=torch.bool)


FIRST_TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "numbered by row": ("raise.index", {"number": lambda n: n.t().reshape(n.shape).contiguous()}),
    "numbered in 8 bits": ("raise.index", {"number": lambda n: n.to(torch.int8).to(torch.int32)}),
    "tokens that are finished": ("raise.ids_range", {"numbering": "softmax", "finished": finished}),
    "numbered from one on": ("raise.index", {"number": lambda n: (n + 1) % n.numel()}),
    "another index at the way back": ("raise.index", {"places": lambda places: places.flip(0)}),
    "read by row": ("raise.literal", {"mode": lambda _: (2,)}),
    "some tokens": ("raise.rows", {"active": lambda tokens: tokens - 1}),
    "other prefix sums": ("raise.counts", {"sums": lambda sums: sums.roll(1)}),
    "prefix sums as counts": ("raise.counts", {"told": 1}),
    "relu between the matmuls": ("raise.activation", {"between": torch.relu}),
    "results weighted twice": ("raise.operation_between", {"out": lambda out: out * 2}),
    "rows returned": ("raise.single_use", {"returned": lambda rows, places, sums, out: rows}),
    "another k": ("raise.weights", {"weights": lambda weights: weights[:, :1].contiguous()}),
}
PERMUTE_TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "counts of other ids": ("raise.counts", {"counted": lambda ids: ids.flip(0) % 7}),
    "bins that end elsewhere": ("raise.counts", {"most": lambda most: most + 2}),
    "counts as prefix sums": ("raise.counts", {"told": 0}),
    "some rows": ("raise.rows", {"kept": lambda _: 11}),
    "the last row dropped": ("raise.rows", {"kept": lambda _: -1}),
    "another index at the way back": ("raise.index", {"places": lambda places: places.flip(0)}),
    "rows changed": ("raise.operation_between", {"rows": lambda rows: rows.neg()}),
    "results returned": ("raise.single_use", {"returned": lambda rows, places, groups, out: out}),
}
ALL_TWINS = [(kind, name, twins[name]) for kind, twins in (
    (first.FirstRouting, FIRST_TWINS), (first.Permuted, PERMUTE_TWINS),
) for name in twins]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "twin"), ALL_TWINS, ids=[f"{k.__name__}, {n}" for k, n, _ in ALL_TWINS])
def test_a_twin_is_left(kind, name, twin):
    code, changes = twin
    lowered = testing.lower_graph(kind(**changes), *chains.inputs(0), deployment=alone())
    assert lowered.report.blocks == () and lowered.ops_before == lowered.ops_after
    assert f"[{code}]" in str(lowered.report.foreign[0].not_raised), lowered.report.foreign[0]


READ_BY = {first.FirstRouting: ("npu_moe_init_routing", 1), first.Permuted: ("npu_grouped_matmul", "group_list")}


@pytest.mark.parametrize("kind", READ_BY)
def test_a_write_into_numbers_or_counts_is_seen(kind):
    """A zero_ between the matmuls, on each value that row_idx or the groups are made of."""
    x, ids, weights = chains.inputs(0)
    base = trace(lambda x, ids, weights: kind()(x, ids, weights), {"x": x, "ids": ids, "weights": weights})
    name, argument = READ_BY[kind]
    reader = next(node for node in base.graph.nodes if name in str(node.target))
    pending = [reader.args[argument] if isinstance(argument, int) else reader.kwargs[argument]]
    read = []
    while pending and pending[0].op == "call_function":
        read += pending
        pending = [node for each in pending for node in each.all_input_nodes if node.op == "call_function"]
    assert len(read) >= 3
    for each in read:
        gm = copy.deepcopy(base)
        written, swiglu = (next(n for n in gm.graph.nodes if n.name == name) for name in (each.name, "npu_swiglu"))
        with gm.graph.inserting_before(swiglu):
            gm.graph.call_function(torch.ops.aten.zero_.default, (written,)).meta.update(val=written.meta["val"])
        gm.recompile()
        lowering = MoeLowering(alone())
        lowering(gm, agreement_timeout=None)
        assert lowering.reports[0].blocks == (), each.name


def test_not_on_one_of_several_ranks():
    with testing.fake_deployment(ep_size=2) as deployment:
        lowered = testing.lower_graph(first.Permuted(), *chains.inputs(0), deployment=deployment)
    assert "[raise.other_group]" in str(lowered.report.foreign[0].not_raised)


@pytest.mark.parametrize("quantisation", ["none", "w8a8"])
@pytest.mark.parametrize("comm", ["mc2", "allgather"])
def test_the_first_dispatch_becomes_the_second(comm, quantisation):
    with testing.fake_deployment(ep_size=2) as deployment:
        layer = variants.First(deployment.ep_communicator, quantisation, "swiglu", 0, 2)
        lowered = testing.lower_graph(layer, *chains.inputs(0), deployment=deployment, comm=comm)
    (block,) = lowered.report.blocks
    assert (block.comm, block.raised_from) == (comm, "mc2_v1"), block.reason
    assert "npu.npu_moe_distribute_dispatch" not in lowered.ops_after
    assert ("npu.npu_moe_distribute_dispatch_v2" in lowered.ops_after) == (comm == "mc2")


@pytest.mark.parametrize("kind", [variants.WaitingFirst, variants.WaitingCopies])
@pytest.mark.parametrize("comm", ["mc2", "allgather"])
def test_another_stream_still_waits_and_overlaps(comm, kind):
    assert ge
    importlib.import_module("torchair.scope._wait_tensor")
    with testing.fake_deployment(ep_size=2) as deployment:
        layer = kind(deployment.ep_communicator, "none", "swiglu", 0, 2)
        lowered = testing.lower_graph(layer, *chains.inputs(0), deployment=deployment.replace(mode="ge"), comm=comm)
    (block,) = lowered.report.blocks
    assert block.comm == comm, block.reason
    notes = " ".join(block.notes)
    if "[raise.already]" in block.reason:
        assert (kind, comm, notes) == (variants.WaitingCopies, "mc2", "")
        return
    assert "[raise.order] 3 operations waited" in notes
    assert "[raise.overlap]" in notes and "kept: dispatch stands where it stood" in notes
    waits = lowered.gm.graph.find_nodes(op="call_function", target=torch.ops.air.wait_tensor.default)
    assert len(waits) == 4 and all(node.args[1] < node for node in waits)


DISPATCH_TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "results weighted twice": ("raise.operation_between", {"out": lambda out: out * 2}),
    "other ids at the way back": ("raise.other_value", {"ids": lambda ids: ids.flip(1)}),
    "a bound at combine": ("raise.both_ends", {"combine": {"global_bs": 16}}),
    "another output dtype": ("raise.literal", {"combine": {"out_dtype": 1}}),
    "prefix sums": ("raise.counts", {"dispatch": {"expert_token_nums_type": 0}}),
    "rows returned": ("raise.single_use", {"returned": lambda rows, scale, counts, out: rows}),
}


@pytest.mark.parametrize("twin", DISPATCH_TWINS)
def test_a_twin_of_the_first_dispatch_is_left(twin):
    code, changes = DISPATCH_TWINS[twin]
    with testing.fake_deployment(ep_size=2) as deployment:
        layer = variants.First(deployment.ep_communicator, "none", "swiglu", 0, 2, **changes)
        lowered = testing.lower_graph(layer, *chains.inputs(0), deployment=deployment, comm="mc2")
    assert lowered.report.blocks == () and f"[{code}]" in str(lowered.report.foreign[0].not_raised)
