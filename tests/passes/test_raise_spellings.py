"""Chains that mean what others mean and are spelled otherwise are raised, and equal to the reference and to what is written.

Twins beside them, which differ in what they compute, are left.
"""

from __future__ import annotations

from typing import Any

import npu_chain_layers as chains
import npu_chain_products as products
import npu_chain_spellings as spelled
import pytest
import torch
from raise_graphs import trace
from reference import relative_error

from moe_lowering import Deployment, MoeLowering, simulator, testing
from moe_lowering.backends.aot import lowering_backend

aten = torch.ops.aten
BOUND = {"none": 2e-2, "w8a8": 4e-2, "w4a16": 2e-2, "w4a8": 4e-2}
FUSED = {"quantisation": "w8a8"}


def compiled(layer: Any) -> tuple[Any, ...]:
    """(result with the pass, as it is written, of the reference, the report)."""
    simulator.enable("A3")
    lowering = MoeLowering(Deployment(soc="A3", installed=(), weight_format="nz"))
    torch._dynamo.reset()
    x, ids, weights = getattr(layer, "inputs", chains.inputs)(0)
    with torch.no_grad():
        lowered = torch.compile(layer, backend=lowering_backend(lowering), fullgraph=True)(x, ids, weights)
        reference = getattr(layer, "reference", lambda *tensors: chains.reference(layer, *tensors))
        return lowered, layer(x, ids, weights), reference(x, ids, weights.bfloat16()), lowering.reports[0]


def require_raised(layer: Any, form: str = "routing_v2") -> Any:
    lowered, written, reference, report = compiled(layer)
    ((comm, raised_from),) = [(block.comm, block.raised_from) for block in report.blocks]
    assert (comm, raised_from) == ("allgather", form) and report.foreign == ()
    for each in (lowered, written):
        assert relative_error(each, reference) < BOUND[layer.quantisation]
    return report.blocks[0]


def require_left(layer: Any, code: str) -> None:
    lowered, written, _, report = compiled(layer)
    assert report.blocks == () and f"[{code}]" in str(report.foreign[0].not_raised), report.foreign
    assert torch.equal(torch.nan_to_num(lowered), torch.nan_to_num(written))


APART: dict[str, tuple[type, dict[str, Any]]] = {
    "of both": (products.SpelledApart, {}),
    "up in front, W8A8": (products.SpelledApart, {"act": products.up_in_front, "quantisation": "w8a8"}),
    "side by side, W8A8": (products.SpelledApart, {"act": products.joined, "quantisation": "w8a8"}),
    "side by side and clipped, W4A16": (
        products.SpelledApart, {"act": products.clipped, "quantisation": "w4a16", "activation": "swiglu_clamp"}
    ),
    "clamped, W4A8": (
        products.SpelledApart, {"act": products.clamped, "quantisation": "w4a8", "activation": "swiglu_clamp"}
    ),
    "permuted": (products.PermutedApart, {}),
    "permuted, up made first": (products.PermutedApart, {"order": ("w3", "w1")}),
    "permuted, side by side": (products.PermutedApart, {"act": products.joined}),
    "permuted, side by side, up made first": (products.PermutedApart, {"act": products.joined, "order": ("w3", "w1")}),
    "the first version, W8A8": (products.FirstApart, {"quantisation": "w8a8", "act": products.up_in_front}),
}  # fmt: skip


@pytest.mark.parametrize("form", APART)
def test_gate_and_up_may_be_two_products(form):
    """Where the layer is what would be chosen it is left: putting weights side by side costs more than a matmul."""
    kind, given = APART[form]
    block = require_raised(kind(**given), {"p": "permute", "t": "routing_v1"}.get(form[0], "routing_v2"))
    left = kind is products.SpelledApart
    assert ("[raise.already]" in block.reason) == (block.ops_before == block.ops_after) == left
    (note,) = [note for note in block.notes if "two tensors" in note]
    assert note.endswith("store them as one, [E, H, 2I]") and ("in every forward" in note) != left


UNGATED: dict[str, tuple[str, Any]] = {
    "relu": ("none", torch.relu),
    "relu2 in float32": ("w8a8", lambda h: torch.square(torch.relu(h.float())).to(h.dtype)),
    "silu": ("w4a16", lambda h: h * torch.sigmoid(h)),
    "gelu": ("w4a8", torch.nn.functional.gelu),
}


@pytest.mark.parametrize("form", UNGATED)
def test_experts_may_have_no_gate(form):
    quantisation, plain = UNGATED[form]
    require_raised(products.SpelledUngated(quantisation=quantisation, plain=plain))


UNGATED_TWINS: dict[str, Any] = {
    "nothing": chains.same,
    "a number": lambda h: h * 2,
    "relu of a shifted one": lambda h: torch.relu(h + 1),
    "one of every other column": lambda h: torch.relu(h[:, ::2]).repeat_interleave(2, -1),
    "one that leaks": torch.nn.functional.leaky_relu,
    "columns in another order": lambda h: torch.relu(h).flip(-1),
    "rows in another order": lambda h: torch.relu(h).flip(0),
}


@pytest.mark.parametrize("twin", UNGATED_TWINS)
def test_other_experts_without_a_gate_are_left(twin):
    assert "[raise.activation]" in reason_of(products.SpelledUngated(plain=UNGATED_TWINS[twin]))


APART_TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "up of other rows": ("raise.single_use", {"w3": torch.Tensor.neg}),
    "up in other groups": ("raise.counts", {"groups of w3": lambda groups: groups.flip(0)}),
    "the gate read again": ("raise.activation", {"read again": True}),
    "the gate twice": ("raise.activation", {"act": lambda gate, up: products.of_halves(gate, gate) + up}),
    "a half of each": ("raise.activation", {"act": lambda gate, up: products.of_halves(gate, up.roll(1, -1))}),
    "a product that nobody reads": ("raise.activation", {"act": lambda gate, up: products.of_halves(gate, gate) + 0 * up}),
    "three side by side": ("raise.activation", {"act": lambda gate, up: torch.cat([gate, up, gate], -1)}),
    "halves of each side by side": (
        "raise.activation", {"act": lambda gate, up: chains.npu().npu_swiglu(torch.cat([gate, gate], -1)) * up}
    ),
    "one over the other": ("raise.activation", {"act": lambda gate, up: products.of_halves(*torch.cat([gate, up]).chunk(2))}),
    "sums apart, W8A8": (
        "raise.operation_between",
        {"quantisation": "w8a8", "act": products.joined, "sums": lambda pair: [pair[0].neg(), pair[1]]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("twin", APART_TWINS)
def test_other_pairs_of_products_are_left(twin):
    code, given = APART_TWINS[twin]
    assert f"[{code}]" in reason_of(products.SpelledApart(**given))


@pytest.mark.parametrize("groups", spelled.GROUPS)
def test_groups_are_what_they_count(groups):
    require_raised(spelled.Spelled(groups=spelled.GROUPS[groups]))


@pytest.mark.parametrize("twin", spelled.GROUP_TWINS)
def test_other_groups_are_left(twin):
    layer = spelled.Spelled(groups=spelled.GROUP_TWINS[twin])
    assert "raise.counts" in reason_of(layer)


def reason_of(layer: Any) -> str:
    """Why a chain is left, of its graph alone: what it computes may be refused by a kernel."""
    lowered = testing.lower_graph(layer, *chains.inputs(0), deployment=Deployment(soc="A3", installed=()))
    assert lowered.report.blocks == () and lowered.ops_before == lowered.ops_after
    return str(lowered.report.foreign[0].not_raised)


@pytest.mark.parametrize("activation", spelled.ACTIVATIONS)
def test_activations_are_what_they_compute(activation):
    name, act = spelled.ACTIVATIONS[activation]
    block = require_raised(spelled.Spelled(activation=name, act=act))
    if name in ("swiglu", "swiglu_oai"):
        assert any(op in block.ops_after for op in ("npu.npu_swiglu", "npu.npu_clipped_swiglu"))


@pytest.mark.parametrize("twin", spelled.ACTIVATION_TWINS)
def test_other_activations_are_left(twin):
    code, act = spelled.ACTIVATION_TWINS[twin]
    require_left(spelled.Spelled(act=act), code)


@pytest.mark.parametrize("code", ["", "raise.written_between", "raise.single_use"])
def test_what_else_reads_the_first_product_is_kept(code):
    """Where graphs keep writes into inputs, as those of npugraph_ex do, such a write stands behind everything, read by nobody."""
    layer = spelled.Spelled(act=spelled.in_float32)
    x, ids, weights = chains.inputs(0)
    made = {"x": x, "ids": ids, "weights": weights, **dict(layer.named_buffers())}
    made["kept"] = torch.zeros(12, 2 * spelled.WIDTH).bfloat16()

    def run(x: Any, ids: Any, weights: Any, kept: Any, **buffers: Any) -> Any:
        return torch.func.functional_call(layer, buffers, (x, ids, weights))

    gm = trace(run, made)
    first = gm.graph.find_nodes(op="call_function", target=torch.ops.npu.npu_grouped_matmul.default)[0]
    (hidden,), kept = first.users, gm.graph.find_nodes(op="placeholder")[-1]
    ops = {
        "raise.written_between": (aten.copy_.default, (kept, hidden)),
        "raise.single_use": (aten.neg.default, (hidden,)),
    }
    with gm.graph.inserting_before(gm.graph.output_node()):
        if code:
            gm.graph.call_function(*ops[code]).meta["val"] = hidden.meta["val"]
    lowering = MoeLowering(Deployment(soc="A3", installed=(), weight_format="nz"))
    lowering(gm)
    report = lowering.reports[0]
    assert [block.comm for block in report.blocks] == ([] if code else ["allgather"])
    assert not code or f"[{code}]" in str(report.foreign[0].not_raised)


ALONE: dict[str, dict[str, Any]] = {
    "the first matmul and SwiGLU in one": {**FUSED, "fused": "first"},
    "in one, version 2": {**FUSED, "fused": "second"},
    "in one, version 2, counts": {**FUSED, "fused": "counts"},
    "rows with a second axis": {"back": 3},
    "scales with an axis more": {"quantisation": "w4a8", "scale": lambda scale: scale.unsqueeze(1)},
    "views there and back": {"quantisation": "w8a8", "back": 2, "views": True},
    "ids past the experts": {"zero": 3, "back": 3},
    "ids past the experts, by a mask": {"zero": 3},
}
ALONE_TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "scales by group": (
        "raise.scale_groups", {"quantisation": "w4a8", "scale": lambda scale: scale.unsqueeze(1).repeat(1, 2, 1)}
    ),
    "counts for prefix sums, in one": (
        "raise.counts", {**FUSED, "fused": "first", "sums": lambda sums: sums.diff(prepend=sums[:1] * 0)}
    ),
    "a third result that is read": (
        "raise.unused", {**FUSED, "fused": "first", "rest": lambda rows, rest: (rows + (rest * 0).to(torch.int8)).to(torch.int8)}
    ),
    "smooth scales, in one": ("raise.smooth_scales", {**FUSED, "fused": "second", "more": {"smooth_scale": torch.ones(8, 64)}}),
    "ids past the experts, no mask": ("raise.partial_range", {"zero": 3, "masked": lambda w, ids: w}),
    "ids past the experts, a mask of one more": (
        "raise.partial_range", {"zero": 3, "masked": lambda w, ids: w * (ids <= chains.EXPERTS)}
    ),
    "ids past the experts, rows of others": (
        "raise.partial_range", {"zero": 3, "back": 3, "index": torch.abs, "masked": lambda w, ids: w}
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", ALONE)
def test_a_chain_in_other_operators(form):
    require_raised(spelled.Spelled(**ALONE[form]))


@pytest.mark.parametrize("twin", ALONE_TWINS)
def test_a_twin_in_other_operators_is_left(twin):
    code, changes = ALONE_TWINS[twin]
    assert f"[{code}]" in reason_of(spelled.Spelled(**changes))


def test_a_router_of_a_chain_that_is_left_as_it_is():
    """It is not told as one whose experts are not known: strict mode takes the layer as it is."""
    written = Deployment(soc="A3", installed=(), weight_format="nz")
    report = testing.lower_graph(spelled.Chosen(), chains.inputs(0)[0], deployment=written, strict=True).report
    assert "[raise.already]" in report.blocks[0].reason and report.foreign == ()
    other = testing.lower_graph(spelled.Chosen(act=torch.relu), chains.inputs(0)[0], deployment=written).report
    assert other.blocks == () and "npu_moe_gating_top_k" in str(other.foreign)


def test_slots_numbered_by_a_permuted_table():
    require_raised(spelled.FirstVersion(spelled.by_column), "routing_v1")
    require_left(spelled.FirstVersion(spelled.by_row), "raise.index")


def within(ids: torch.Tensor) -> torch.Tensor:
    """Ids past the experts as expert 0, which a token may have chosen already."""
    return ids * (ids < chains.EXPERTS).to(ids.dtype)


SHARED: dict[str, tuple[str, type, dict[str, Any]]] = {
    "by a stored table": ("raise.partial_range", spelled.InPlace, {"own": "stored"}),
    "by a table off by one": ("raise.partial_range", spelled.InPlace, {"own": "table", "table": lambda table: table.roll(1)}),
    "rows of others": ("raise.partial_range", spelled.InPlace, {"back": "drop", "index": torch.abs}),
    "ids that may repeat": ("raise.ids_range", spelled.InPlace, {"ids": within}),
    "no mask, tokens of all": ("raise.partial_range", spelled.InPlaceReduced, {"back": "drop"}),
    "prefix sums returned": ("raise.single_use", spelled.PrefixSums, {"shared": "", "returned": lambda sums: sums + 0}),
}  # fmt: skip


@pytest.mark.parametrize("twin", [*SHARED, "none: by a table", "none: dropped"])
def test_twins_over_two_ranks_are_left(twin):
    code, kind, changes = SHARED.get(
        twin, ("", spelled.InPlace, {"own": "table"} if "table" in twin else {"back": "drop"})
    )
    with testing.fake_deployment(ep_size=2) as pair:
        same = {"tp_size": 2, "tp_rank": 0, "tp_group": pair.ep_group} if kind is spelled.InPlaceReduced else {}
        layer = kind(pair.ep_communicator, "none", "swiglu", 0, 2, **changes)
        lowered = testing.lower_graph(layer, *chains.inputs(0), deployment=pair.replace(**same), comm="mc2")
    if not code:
        assert [block.comm for block in lowered.report.blocks] == ["mc2"]
        return
    assert lowered.report.blocks == () and lowered.ops_before == lowered.ops_after
    assert f"[{code}]" in str(lowered.report.foreign[0].not_raised)
