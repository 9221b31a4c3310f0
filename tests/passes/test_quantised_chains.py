"""Which operators a block with quantised weights becomes, on one rank.

What is expected is written from the operators' documentation: npu_grouped_matmul_swiglu_quant(_v2) up to 10,240 columns,
FRACTAL_NZ and not transposed on A2 and A3, ND on A5; npu_dequant_swiglu_quant with groups on A2 and A3 up to 3,616
columns of its result, a multiple of 64, with clamps too from CANN 8.5 on; npu_swiglu_quant on A2 and A3 up to 4,096; SwiGLU
with the gate first in all. What they compute: test_quantised_chain_numbers.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantised_blocks import CHAINS, EXPERTS, HIDDEN, INNER, OPERATORS, block, given, inputs
from torch import Tensor

from moe_lowering import Deployment, testing
from moe_lowering.matrix.forms import FORMS
from moe_lowering.passes import decision
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.passes.legality import judge


def transposed(weights: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    """The same numbers, as views of tensors [E, N, K]."""
    return {n: w.transpose(1, 2).contiguous().transpose(1, 2) if n in names else w for n, w in weights.items()}


def lower(weights: dict[str, Any], x: tuple[Tensor, ...] | None = None, options: Any = None, **fields: Any) -> Any:
    where = Deployment(**{"soc": "A3", "weight_format": "nz", "cann": "9.1.0", "torch_npu": "2.13.0", **fields})
    return testing.lower_graph(block(weights, **(options or {})), *(x or inputs()), deployment=where, comm="allgather")


def chain_of(lowered: Any) -> list[str]:
    return [name for name in lowered.ops_after if name in OPERATORS]


EXPECTED = [
    ("fused", {}, {}),
    ("fused", {}, {"soc": "A2"}),
    ("fused", {}, {"soc": "A5", "weight_format": "nd"}),
    ("dequant", {}, {"weight_format": "nd"}),
    ("dequant", {}, {"weight_format": "nd", "soc": "A2"}),
    ("plain", {}, {"soc": "A5"}),  # the first wants ND there, the second does not exist
    ("dequant", {"transposed": ("w13", "w2")}, {}),
    ("fused", {"transposed": ("w13", "w2")}, {"soc": "A5", "weight_format": "nd"}),
    ("joined", {"inner": 96}, {"weight_format": "nd"}),  # not a multiple of 64
    ("plain", {"inner": 96}, {"weight_format": "nd", "mode": "ge"}),  # which has no converter for the joined one
    ("fused", {"inner": 96}, {}),
    ("activation", {"options": {"interleaved": True}}, {}),
    ("activation", {"options": {"interleaved": True}}, {"weight_format": "nd"}),
    *(
        (chain, {"inner": inner, "options": {**clamps, "interleaved": interleaved}}, fields)
        for clamps in ({"activation": "swiglu_clamp", "limit": 7.0}, {"activation": "swiglu_oai", "limit": 3.0})
        for chain, inner, interleaved, fields in (
            ("dequant", INNER, False, {}),
            ("dequant", INNER, True, {"soc": "A2", "weight_format": "nd"}),
            ("dequant", INNER, True, {"torch_npu": "2.12.0"}),
            ("activation", INNER, False, {"torch_npu": "2.12.0"}),  # which knows no clamps of halves
            ("activation", INNER, True, {"cann": "8.3.RC1"}),  # and this one no clamps
            ("activation", INNER, True, {"cann": ""}),
            ("activation", INNER, True, {"soc": "A5"}),
            ("activation", 96, False, {}),
        )
    ),
    ("activation", {"options": {"activation": "gelu"}}, {}),
]


@pytest.mark.parametrize(("expected", "what", "fields"), EXPECTED, ids=str)
def test_the_chain(expected: str, what: dict[str, Any], fields: dict[str, str]) -> None:
    weights = transposed(given(what.get("inner", INNER)), *what.get("transposed", ()))
    lowered = lower(weights, options=what.get("options"), **fields)
    assert lowered.report.blocks[0].comm == "allgather", lowered.report.blocks[0].reason
    assert chain_of(lowered) == CHAINS[expected]


@pytest.mark.parametrize(("inner", "weight_format", "expected"), [
    (5120, "nz", "fused"), (5152, "nz", "plain"), (3584, "nd", "dequant"), (3648, "nd", "joined"),
    (4096, "nd", "joined"), (4128, "nd", "plain"), (14336, "nz", "plain"),
])  # fmt: skip
def test_wide_experts_take_the_next_chain(inner: int, weight_format: str, expected: str) -> None:
    """The widest of each chain, and the next; 14,336 is Mixtral's."""
    with testing.fake_tensors():
        weights = {
            "w13": torch.empty(EXPERTS, HIDDEN, 2 * inner, dtype=torch.int8),
            "w2": torch.empty(EXPERTS, inner, HIDDEN, dtype=torch.int8),
            "w13_scale": torch.empty(EXPERTS, 2 * inner), "w2_scale": torch.empty(EXPERTS, HIDDEN),
        }  # fmt: skip
        x = (torch.empty(4, HIDDEN, dtype=torch.bfloat16), torch.empty(4, 2), torch.empty(4, 2, dtype=torch.int32))
    lowered = lower(weights, x, weight_format=weight_format)
    assert lowered.report.blocks[0].comm == "allgather", lowered.report.blocks[0].reason
    assert chain_of(lowered) == CHAINS[expected]


FLOATS = torch.rand(8, 1024, generator=torch.Generator().manual_seed(3)).bfloat16().float()


@pytest.mark.parametrize(
    "stored",
    [FLOATS, FLOATS.bfloat16(), FLOATS.view(torch.int32).long(), FLOATS.view(torch.int32).long() | (7 << 40)],
    ids=["float32", "bfloat16", "bits", "bits below others"],
)
def test_scales_of_the_operator_for_decoding_are_the_numbers_that_are_stored(stored: Tensor) -> None:
    """It takes float32. Kept as bits, for dispatch_ffn_combine, scales are read as bits and not as whole numbers."""
    with testing.fake_deployment(ep_size=2, fused_mode=2) as deployment, testing.fake_tensors():
        experts = {
            "w13": torch.empty(8, 1024, 1024, dtype=torch.int8), "w2": torch.empty(8, 512, 1024, dtype=torch.int8),
            "w13_scale": torch.empty(8, 1024, dtype=stored.dtype), "w2_scale": torch.empty(8, 1024, dtype=stored.dtype),
        }  # fmt: skip
        x = torch.empty(4, 1024, dtype=torch.bfloat16), torch.empty(4, 2), torch.empty(4, 2, dtype=torch.int32)
        run = block(experts, num_experts=16, deployment=deployment)
        lowered = testing.lower_graph(run, *x, deployment=deployment, comm="fused_mc2")
    assert lowered.report.blocks[0].comm == "fused_mc2", lowered.report.blocks[0].reason
    operator = torch.ops.moe_lowering.dispatch_gmm_combine_decode.default
    (call,) = lowered.gm.graph.find_nodes(op="call_function", target=operator)
    for name in ("w13_scale", "w2_scale"):
        (scale,) = call.kwargs[name]
        torch.testing.assert_close(value_of(scale, stored), FLOATS, rtol=0, atol=0)


@pytest.mark.parametrize("name", FORMS)
def test_no_form_takes_the_bits_of_scales_for_numbers(name: str) -> None:
    """Every form with the scales of dispatch_ffn_combine: int64 that is cast to a float would be another number."""
    form = FORMS[name]
    fields = {"ep_size": 2, **form.deployment_fields(form.layout("w8a8"))}
    shapes = {"w13": (8, 1024, 1024), "w2": (8, 512, 1024), "w13_scale": (8, 1024), "w2_scale": (8, 1024)}
    with testing.fake_deployment(**fields) as deployment, testing.fake_tensors():
        experts: dict[str, Any] = {}
        for weight, shape in shapes.items():
            whole = torch.empty(shape, dtype=torch.int64 if weight.endswith("scale") else torch.int8)
            experts[weight] = list(whole.unbind()) if form.lists else whole
        x = torch.empty(4, 1024, dtype=torch.bfloat16), torch.empty(4, 2), torch.empty(4, 2, dtype=torch.int32)
        lowered = testing.lower_graph(
            block(experts, num_experts=16, deployment=deployment), *x, deployment=deployment, comm=form.comm
        )
    assert lowered.report.blocks[0].comm == form.comm, lowered.report.blocks[0].reason
    casts = lowered.gm.graph.find_nodes(op="call_function", target=torch.ops.aten._to_copy.default)
    pairs = [(node.args[0].meta["val"].dtype, node.meta["val"].dtype) for node in casts]
    assert not [pair for pair in pairs if pair[0] == torch.int64 and pair[1].is_floating_point]


def value_of(node: torch.fx.Node, stored: Tensor) -> Tensor:
    """What a node computes from one tensor that is stored."""
    if node.op != "call_function":
        return stored
    args = torch.fx.map_arg(node.args, lambda each: value_of(each, stored))
    return node.target(*args, **node.kwargs)


def test_lists_of_int8_weights_are_refused() -> None:
    """A8W8 of aclnnGroupedMatmulV5: lists of length 1. The twin is the stack of the same tensors."""
    stacked = given()
    lists = {name: list(tensor.unbind()) for name, tensor in stacked.items()}
    for weight_format in ("nz", "nd"):
        testing.assert_refused(lower(lists, weight_format=weight_format), code="gmm.quant_single_weight")
        testing.assert_lowered(lower(stacked, weight_format=weight_format), comm="allgather")


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("weight_format", ["nz", "nd"])
@pytest.mark.parametrize("comm", ["allgather", "alltoall", "mc2"])
def test_verdict_and_emission_choose_alike_on_every_rank(
    comm: str, weight_format: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {name: tensor[:1] for name, tensor in given(512, 1024).items()}  # of 4 ranks with one expert each
    specs = []

    def noted(spec: Any, *rest: Any, **more: Any) -> Any:
        specs.append(spec)
        return judge(spec, *rest, **more)

    monkeypatch.setattr(decision, "judge", noted)
    with testing.fake_deployment(ep_size=4, ep_rank=rank, weight_format=weight_format) as where:
        lowered = testing.lower_graph(block(weights, deployment=where), *inputs(1024), deployment=where, comm=comm)
        judged = [f"npu.{call.operator}" for call in IMPLEMENTATIONS[comm].forms(where)[0].calls(specs[0], where)]
    testing.assert_lowered(lowered, comm=comm)
    chain = CHAINS["fused" if weight_format == "nz" else "dequant"]
    expected = chain[1:] if comm == "mc2" else chain  # its dispatch quantises
    assert chain_of(lowered) == [name for name in judged if name in OPERATORS] == expected
