"""Hand-written chains of one rank (``npu_moe_init_routing_v2``): raised, lowered to AllGather of one rank, and compared.

With the reference (float64, dense), and with the chain as it is written. Chains of several ranks: test_raise_npu_chains.
"""

from __future__ import annotations

from typing import Any

import npu_chain_jobs as jobs
import npu_chain_layers as chains
import pytest
import torch
from reference import relative_error
from test_raise_npu_chains import BOUND

from moe_lowering import Deployment, MoeLowering, testing
from moe_lowering.backends.aot import lowering_backend

ALONE: dict[str, dict[str, Any]] = {
    "W8A8, counts": {"quantisation": "w8a8", "back": "finalize", "kind": 1, "shared": True},
    "two skips": {"quantisation": "none", "back": "finalize", "shared": True, "finalize": jobs.skipped_twice},
    "W8A8, int8 tokens": {"quantisation": "w8a8", "travels": True},
    "W8A8, pairs": {"quantisation": "w8a8", "back": "finalize", "kind": 2},
    "W8A8, pairs, smooth scales": {"quantisation": "w8a8", "back": "finalize", "kind": 2, "smooth": "both"},
    "W8A8, smooth tokens": {"quantisation": "w8a8", "smooth": "tokens"},
    "W8A8, unpermute": {"quantisation": "w8a8", "back": "unpermute"},
    "bfloat16, prefix sums": {"quantisation": "none", "back": "finalize", "kind": 0, "shared": True},
    "W4A16": {"quantisation": "w4a16", "back": "unpermute"},
    "GEGLU": {"quantisation": "none", "activation": "gelu_tanh", "back": "unpermute", "kind": 0},
}


def compiled_alone(case: dict[str, Any], tokens: int = 6, **changes: Any) -> tuple[Any, ...]:
    given = {"activation": "swiglu", **case, **changes}
    layer = chains.Routed(given.pop("quantisation"), given.pop("activation"), **given)
    lowering = MoeLowering(Deployment(soc="A3", installed=(), weight_format="nz"))
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=lowering_backend(lowering), fullgraph=True)
    x, ids, weights = chains.inputs(0, tokens)
    with torch.no_grad():
        reference = chains.reference(layer, x, ids, weights.bfloat16())
        if layer.shared:
            skips = 2 if "finalize" in layer.changes else 1
            reference = reference + skips * (x.double() @ layer.w_shared.double())
        return compiled(x, ids, weights), layer(x, ids, weights), reference, lowering.reports[0]


@pytest.mark.parametrize("form", ALONE)
def test_a_chain_of_one_rank(form):
    lowered, written, reference, report = compiled_alone(ALONE[form])
    quantisation = ALONE[form]["quantisation"]
    for result in (lowered, written):
        assert relative_error(result, reference) < BOUND[quantisation]
    (block,) = report.blocks
    assert (block.comm, block.raised_from) == ("allgather", "routing_v2") and report.foreign == ()
    if ALONE[form].get("smooth") == "both":  # pairs are counts then, and the same operators
        assert "npu.npu_dequant_swiglu_quant" in block.ops_after and torch.equal(lowered, written)
    elif quantisation == "w8a8":  # its experts get the operator that is one for matmul, SwiGLU and quantisation
        assert "npu.npu_grouped_matmul_swiglu_quant_v2" in block.ops_after
    else:
        assert block.ops_after == block.ops_before and "[raise.already]" in block.reason
        assert torch.equal(lowered, written)


def test_layers_that_read_each_other():
    layers = [chains.Routed("w8a8", "swiglu", back=back) for back in chains.ROUTED]
    lowering = MoeLowering(Deployment(soc="A3", installed=(), weight_format="nz"), strict=True)
    torch._dynamo.reset()
    x, ids, weights = chains.inputs(0)

    def run(x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = x + layer(x, ids, weights)
        return layers[0](x, ids, weights)

    with torch.no_grad():
        lowered, written = torch.compile(run, backend=lowering_backend(lowering), fullgraph=True)(x), run(x)
    assert relative_error(lowered, written) < 4e-2
    assert [block.comm for block in lowering.reports[0].blocks] == ["allgather"] * 3


def test_what_the_generic_operators_refuse_is_left_with_their_reason():
    layer = chains.Routed("w8a8", "swiglu")
    layer.w13_scale = layer.w13_scale[:, :64]
    report = testing.lower_graph(layer, *chains.inputs(0), deployment=Deployment(soc="A3", installed=())).report
    ((comm, reason),) = [(block.comm, block.reason) for block in report.blocks]
    shapes = f"w13_scale has shape [{chains.EXPERTS}, 64]; accepted: [{chains.EXPERTS}, 128]"
    assert comm is None and "[raise.generic]" in reason and shapes in reason


def test_a_twin_of_one_rank_computes_what_it_did():
    lowered, written, _, report = compiled_alone(ALONE["W8A8, counts"], dequant={"activate_left": False})
    assert report.blocks == () and "[raise.gate_second]" in str(report.foreign[0])
    assert torch.equal(lowered, written)


@pytest.mark.parametrize("mode", ["report", "off"])
def test_a_chain_is_named_or_not_looked_for(mode):
    layer = chains.Routed("none", "swiglu")
    lowering = MoeLowering(Deployment(soc="A3", installed=()), raise_foreign=mode)
    report = testing.lower_graph(layer, *chains.inputs(0), deployment=lowering.deployment, lowering=lowering).report
    named = [(block.comm, block.raised_from) for block in report.blocks]
    assert named == ([(None, "routing_v2")] if mode == "report" else [])
    assert len(report.foreign) == (0 if mode == "report" else 2)


def test_an_operator_of_no_form_is_recognised_and_left():
    def re_routing(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.npu.npu_moe_re_routing(x, torch.full((2, 1), 3))[0]

    report = testing.lower_graph(re_routing, chains.inputs(0)[0], deployment=Deployment(soc="A3", installed=())).report
    assert "[raise.version] npu.npu_moe_re_routing, which is recognised" in str(report.foreign[0])
