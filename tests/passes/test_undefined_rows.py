"""Every operator that leaves rows undefined, in each weight format: the rows are there, planted as NaN, and nothing reads them.

The simulator's kernels fill what the real operators leave undefined. Here each call of a lowered layer is looked at as it
runs: that rows were undefined at all is asserted, then that the result is what it is without them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from moe_lowering import Deployment, MoeLowering, lowering_backend, moe_experts
from moe_lowering.quantisation import quantise_weight, scale_bits
from moe_lowering.vocabulary import EXPERT_FORMATS

OPS = torch.ops.moe_lowering
EXPERTS, TOP_K, HIDDEN, INNER, TOKENS = 8, 2, 256, 256, 10
KNOWN = {"cann": "9.1.0", "torch_npu": "2.13.0"}
CLAMPS = {"activation": "swiglu_oai", "limit": 3.0}
ROUTE, MATMUL, SWIGLU = "npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_swiglu"
FUSED, DEQUANT, JOINED = "npu_grouped_matmul_swiglu_quant_v2", "npu_dequant_swiglu_quant", "npu_swiglu_quant"
OTHER = {"unpermute_operator": "finalize_routing"}
CASES: dict[
    str, tuple[str, dict[str, str], dict[str, Any], tuple[str, ...]]
] = {  # format, deployment, options, operators
    "none": ("none", {}, {}, (ROUTE, MATMUL, SWIGLU)),
    "none, clamps": ("none", {}, CLAMPS, (ROUTE, MATMUL, "npu_clipped_swiglu")),
    "w8a8": ("w8a8", {"weight_format": "nz"}, {}, (ROUTE, FUSED, MATMUL)),
    "w8a8, ND": ("w8a8", {}, {}, (ROUTE, MATMUL, DEQUANT)),
    "w8a8, clamps": ("w8a8", {}, CLAMPS, (ROUTE, MATMUL, DEQUANT)),
    "w8a8, other activation": ("w8a8", {}, {"activation": "gelu"}, (ROUTE, MATMUL, "npu_dynamic_quant")),
    "w4a8": ("w4a8", {"weight_format": "nz"}, {}, (ROUTE, MATMUL, JOINED)),
    "w4a16": ("w4a16", {"weight_format": "nz"}, {}, (ROUTE, MATMUL, SWIGLU)),
    "none, finalize_routing": ("none", OTHER, {}, (ROUTE, MATMUL, SWIGLU)),
}


def experts(form: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    given: dict[str, Any] = {"quantisation": form}
    for name, rows, columns in (("w13", HIDDEN, 2 * INNER), ("w2", INNER, HIDDEN)):
        weights = (torch.randn(EXPERTS, rows, columns, generator=generator) / rows**0.5).bfloat16()
        if form == "none":
            given[name] = weights
            continue
        quantised = quantise_weight(weights, form)
        scale = scale_bits(quantised.scale) if form == "w4a8" else quantised.scale
        given |= {name: quantised.weight, f"{name}_scale": scale, f"{name}_offset": quantised.offset}
        given[f"{name}_scale_bias"] = quantised.scale_bias
    return {name: value for name, value in given.items() if value is not None}


class Watched(Interpreter):
    """Runs a lowered graph and notes the operators of which some result has rows that are undefined."""

    def __init__(self, gm: GraphModule, undefined: set[str]) -> None:
        super().__init__(gm)
        self.undefined = undefined

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        name = getattr(getattr(n.target, "_schema", None), "name", "")
        if name.startswith("npu::"):
            read = [result[user.args[1]] for user in n.users if user.target is operator.getitem]
            results = read if isinstance(result, (tuple, list)) else (result,)
            if any(t.is_floating_point() and bool(t.isnan().any()) for t in results if isinstance(t, Tensor)):
                self.undefined.add(name.removeprefix("npu::"))
        return result


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    ids = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(1)[:, :TOP_K].int()
    return x, torch.rand(TOKENS, TOP_K, generator=generator), ids


def run_lowered(layer: Callable[..., Tensor], arguments: Sequence[Tensor], **fields: str) -> tuple[Tensor, set[str]]:
    """What a lowered layer gives, and the operators that left rows undefined."""
    undefined: set[str] = set()
    lowering = MoeLowering(Deployment(**KNOWN, **fields), "allgather", strict=True)

    def watch(gm: GraphModule, *_: Any) -> None:
        watched = Watched(GraphModule(gm, gm.graph), undefined)
        gm.forward = lambda *arguments: watched.run(*arguments)  # type: ignore[method-assign]

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=lowering_backend(lowering, watch), fullgraph=True)
    with torch.no_grad():
        return compiled(*arguments), undefined


def run(form: str, fields: dict[str, str], options: dict[str, Any], mask: Tensor) -> tuple[Tensor, set[str]]:
    given = experts(form) | options

    def layer(x: Tensor, weights: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return moe_experts(x, weights, ids, mask=mask, **given)

    return run_lowered(layer, (*tokens(), mask), **fields)


@pytest.mark.parametrize("name", CASES)
def test_undefined_rows_are_there_and_are_not_read(name: str) -> None:
    form, fields, options, operators = CASES[name]
    every, some = torch.ones(TOKENS, dtype=torch.bool), torch.arange(TOKENS) % 3 != 0
    full, nothing = run(form, fields, options, every)
    y, undefined = run(form, fields, options, some)
    assert not nothing, "all rows are valid"
    assert undefined >= set(operators), "the twin: with masked tokens these leave rows undefined"
    assert torch.equal(y[some], full[some]) and not y[~some].any()


@pytest.mark.parametrize("fields", [{}, OTHER], ids=str)
def test_slots_of_zero_experts_read_no_undefined_row(fields: dict[str, str]) -> None:
    given, spare = experts("none"), 2
    group = (EXPERTS - spare, "", 1, "", 1, 0)
    w13, w2 = ([given[name][: EXPERTS - spare]] for name in ("w13", "w2"))

    def layer(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        rows, scale, counts, handle = OPS.dispatch(x, None, ids, None, *group, 0, zero_experts=spare)
        y = OPS.grouped_mlp(rows, scale, counts, w13, w2, [], [], "swiglu", 0.0, 0.0, False)
        return OPS.combine(y, weights, ids, handle, None, *group, zero_experts=spare)

    x, weights, ids = tokens()
    y, undefined = run_lowered(layer, (x, weights, ids), **fields)
    assert undefined >= {ROUTE, MATMUL} and bool((ids >= EXPERTS - spare).any())
    torch.testing.assert_close(y, layer(x, weights, ids), rtol=2**-6, atol=2**-6)
    _, nothing = run_lowered(layer, (x, weights[:, :1], ids[:, :1] % (EXPERTS - spare)), **fields)
    assert not nothing, "the twin: each slot has a row"


def test_every_weight_format_is_tried() -> None:
    assert {form for form, *_ in CASES.values()} == set(EXPERT_FORMATS)
