"""What the operators of a block with quantised weights compute, on one rank, against a model in whole numbers.

Which operators they are: test_quantised_chains.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantised_blocks import CHAINS, EXPERTS, INNER, OPERATORS, block, given, inputs
from quantised_numbers import scale_bits
from torch import Tensor

from moe_lowering import Deployment, moe_experts, testing
from moe_lowering.backends.aot import lowering_backend
from moe_lowering.passes.pipeline import MoeLowering

# ------------------------------------------------------------------------------------------------------------- numbers


def int8(row: Tensor) -> tuple[list[int], Tensor]:
    """round half to even of row * 127 / max|row|, in Python; and max|row| / 127 in float32."""
    scale = row.float().abs().max() / 127
    return [max(-127, min(127, round(float(value)))) for value in row.float() / scale], scale


def product(row: list[int], matrix: Tensor) -> Tensor:
    return torch.tensor([sum(a * b for a, b in zip(row, column, strict=True)) for column in matrix.t().tolist()])


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + torch.exp(-gate)) * up


def clamped(limit: float, alpha: float, bias: float) -> Any:
    def activation(gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate / (1 + torch.exp(-alpha * gate)) * (up + bias)

    return activation


def token(
    x: Tensor, weights: dict[str, Tensor], expert: int, between: torch.dtype, out: torch.dtype, activation: Any = swiglu,
    interleaved: bool = False, after: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """One expert's result of one token. ``between`` is what the first matmul's result is rounded to, and the activation's,
    where that is not rounded to ``after``."""
    row, scale = int8(x)
    sums = product(row, weights["w13"][expert].long()).float()
    hidden = (sums * weights["w13_scale"][expert] * scale).to(between)
    wide = hidden.double()
    activated = activation(*((wide[0::2], wide[1::2]) if interleaved else wide.split(len(wide) // 2)))
    activated = activated.float().to(after or between)
    row, scale = int8(activated)
    sums = product(row, weights["w2"][expert].long()).float()
    return (sums * weights["w2_scale"][expert] * scale).to(out)


def model(
    x: Tensor, routing: Tensor, ids: Tensor, weights: dict[str, Tensor], between: torch.dtype, *how: Any
) -> Tensor:
    rows = []
    for at, row in enumerate(x):
        parts = [token(row, weights, e, between, x.dtype, *how).double() for e in ids[at].tolist()]
        rows.append(sum(w * part for w, part in zip(routing[at].double(), parts, strict=True)))
    return torch.stack(rows)


def ratio(actual: Tensor, expected: Tensor) -> float:
    """Signal-to-noise in dB of the worst token."""
    noise = (actual.double() - expected).square().sum(1)
    return float((10 * torch.log10(expected.square().sum(1) / noise)).min())


# bfloat16 rounds the result of the second matmul, the routing weight and the sum: 2**-9 of each, -52 dB in all. A value
# that falls on the other side of a rounding to int8, since exp is not the same to the last bit, changes one of 128.
FLOOR = 44.0


@pytest.mark.parametrize(("name", "fields", "between", "after"), [
    ("fused", {}, torch.float32, None),
    ("dequant", {"weight_format": "nd"}, torch.float32, None),
    ("plain", {"weight_format": "nz", "soc": "A5"}, torch.bfloat16, None),
    ("joined", {"weight_format": "nd"}, torch.bfloat16, torch.float32),
])  # fmt: skip
def test_each_chain_against_whole_numbers(
    name: str, fields: dict[str, str], between: torch.dtype, after: torch.dtype | None
) -> None:
    weights, (x, routing, ids) = given(96 if name == "joined" else INNER), inputs()
    got, chain = run_chain(weights, (x, routing, ids), **fields)
    assert chain == CHAINS[name]
    how = (between, swiglu, False, after)
    assert ratio(got, model(x, routing, ids, weights, *how)) > FLOOR
    for wrong in (
        {**weights, "w13_scale": weights["w13_scale"].roll(1, 0)},
        {**weights, "w13": torch.cat(weights["w13"].chunk(2, 2)[::-1], 2)},  # up first
        {**weights, "w2_scale": weights["w2_scale"] * 1.02},
    ):
        assert ratio(got, model(x, routing, ids, wrong, *how)) < FLOOR


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("activation", "alpha", "numbers"), [
    ("swiglu_clamp", 1.0, clamped(0.3, 1.0, 0.0)), ("swiglu_oai", 1.5, clamped(0.3, 1.5, 1.0)),
])  # fmt: skip
def test_clamps_in_one_operator_against_whole_numbers(
    activation: str, alpha: float, numbers: Any, interleaved: bool
) -> None:
    """gpt-oss's and DeepSeek's, with a limit that binds: without it, or with the columns paired otherwise, it is not this."""
    weights, (x, routing, ids) = given(), inputs()
    options = {"activation": activation, "limit": 0.3, "alpha": alpha, "interleaved": interleaved}
    known = {"cann": "9.1.0", "torch_npu": "2.13.0"}
    got, chain = run_chain(weights, (x, routing, ids), options, **known)
    assert chain == CHAINS["dequant"]
    assert ratio(got, model(x, routing, ids, weights, torch.float32, numbers, interleaved)) > FLOOR
    for wrong in (numbers, not interleaved), (clamped(30.0, alpha, 0.0), interleaved), (swiglu, interleaved):
        assert ratio(got, model(x, routing, ids, weights, torch.float32, *wrong)) < FLOOR


def test_scales_that_are_kept_as_bits() -> None:
    """As dispatch_ffn_combine wants them: the dequantising operator gets their float32."""
    weights = given()
    wide = {**weights, "w13_scale": scale_bits(weights["w13_scale"]), "w2_scale": scale_bits(weights["w2_scale"])}
    got, chain = run_chain(wide, inputs(), weight_format="nd")
    assert chain == CHAINS["dequant"]
    assert torch.equal(got, run_chain(weights, inputs(), weight_format="nd")[0])


def run_chain(
    weights: dict[str, Tensor], x: tuple[Tensor, ...], options: Any = None, **fields: str
) -> tuple[Tensor, list[str]]:
    """The lowered graph's result with the simulator's kernels, which fill what is undefined with the least integer."""
    where = Deployment(**{"soc": "A3", "weight_format": "nz", **fields})
    lowering = MoeLowering(where, "allgather", strict=True)
    seen: list[str] = []

    def note(gm: Any, *_: Any) -> None:
        calls = [n.target for n in gm.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
        seen.extend(op._schema.name.replace("::", ".") for op in calls)

    torch._dynamo.reset()
    with torch.no_grad():
        y = torch.compile(block(weights, **(options or {})), backend=lowering_backend(lowering, note), fullgraph=True)(
            *x
        )
    return y, [name for name in seen if name in OPERATORS]


# ------------------------------------------------------------------------------------------------------ bits of scales


def test_bits_of_negative_scales_leave_the_high_half_empty() -> None:
    """Hardware reads flags there; widened as a signed number, the sign bit of -1.5 would fill it."""
    scale = torch.tensor([[1.0, -1.5], [0.25, -3e-5]])
    hidden = 256
    weights: dict[str, Any] = {
        "w13": torch.zeros(EXPERTS, hidden, 2 * hidden // 8, dtype=torch.int32),
        "w2": torch.zeros(EXPERTS, hidden, hidden // 8, dtype=torch.int32),
        "w13_scale": scale.repeat(EXPERTS // 2, hidden), "w2_scale": scale.repeat(EXPERTS // 2, hidden // 2),
        "w13_scale_bias": torch.zeros(EXPERTS, 2 * hidden), "w2_scale_bias": torch.zeros(EXPERTS, hidden),
    }  # fmt: skip

    def run(x: Tensor, routing: Tensor, ids: Tensor, w13_scale: Tensor, w2_scale: Tensor) -> Tensor:
        fixed = {name: tensor for name, tensor in weights.items() if not name.endswith("_scale")}
        return moe_experts(x, routing, ids, quantisation="w4a8", w13_scale=w13_scale, w2_scale=w2_scale, **fixed)

    where = Deployment(soc="A3", weight_format="nz")
    given_scales = (weights["w13_scale"], weights["w2_scale"])
    lowered = testing.lower_graph(run, *inputs(hidden), *given_scales, deployment=where, comm="allgather")
    matmuls = [n for n in lowered.gm.graph.nodes if n.target is torch.ops.npu.npu_grouped_matmul.default]
    assert len(matmuls) == 2
    found = [computed(matmul.kwargs["scale"][0], given_scales) for matmul in matmuls]
    for got, expected in zip(found, given_scales, strict=True):
        assert torch.equal(got, scale_bits(expected))
        assert (got >> 32 == 0).all() and (got < 0).sum() == 0


def computed(node: Any, known: tuple[Tensor, ...]) -> Tensor:
    """The value of a node that is made of one of the tensors ``known`` alone; its placeholder is told by its shape."""
    if node.op == "placeholder":
        (value,) = (t for t in known if t.shape == node.meta["val"].shape)
        return value
    args = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: computed(n, known))
    return node.target(*args[0], **args[1])
