"""Which operators a block with quantised weights becomes, and what they compute, on one rank.

What is expected is written from the operators' documentation: npu_grouped_matmul_swiglu_quant(_v2) up to 10,240 columns,
FRACTAL_NZ and not transposed on A2 and A3, ND on A5; npu_dequant_swiglu_quant with groups on A2 and A3 up to 3,616
columns of its result, a multiple of 64, with clamps too from CANN 8.5 on; npu_swiglu_quant on A2 and A3 up to 4,096; SwiGLU
with the gate first in all. Numbers are compared with a model in whole numbers.
"""

from __future__ import annotations

import struct
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lowering import Deployment, moe_experts, testing
from moe_lowering.backends.aot import lowering_backend
from moe_lowering.matrix.forms import FORMS
from moe_lowering.passes import decision
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.passes.legality import judge
from moe_lowering.passes.pipeline import MoeLowering

EXPERTS, TOP_K, HIDDEN, INNER, TOKENS = 4, 2, 64, 128, 11
FUSED, DEQUANT = "npu.npu_grouped_matmul_swiglu_quant_v2", "npu.npu_dequant_swiglu_quant"
MATMUL, SWIGLU, QUANT = "npu.npu_grouped_matmul", "npu.npu_swiglu", "npu.npu_dynamic_quant"
JOINED = "npu.npu_swiglu_quant"
CHAINS = {
    "fused": [QUANT, FUSED, MATMUL],
    "dequant": [QUANT, MATMUL, DEQUANT, MATMUL],
    "joined": [QUANT, MATMUL, JOINED, MATMUL],
    "plain": [QUANT, MATMUL, SWIGLU, QUANT, MATMUL],
    "activation": [QUANT, MATMUL, QUANT, MATMUL],  # composed of ATen operators
}
OPERATORS = {name for chain in CHAINS.values() for name in chain}


def given(inner: int = INNER, hidden: int = HIDDEN, seed: int = 0) -> dict[str, Tensor]:
    """int8 weights [E, K, N] and float32 scales that bfloat16 can hold."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, rows, columns in (("w13", hidden, 2 * inner), ("w2", inner, hidden)):
        whole = torch.randint(-127, 128, (EXPERTS, rows, columns), generator=generator)
        found[name] = whole.to(torch.int8)
        scale = (torch.rand(EXPERTS, columns, generator=generator) + 0.5) / (64 * rows**0.5)
        found[f"{name}_scale"] = scale.bfloat16().float()
    return found


def inputs(hidden: int = HIDDEN, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, hidden, generator=generator).to(dtype)
    ids = torch.rand(TOKENS, EXPERTS - 1, generator=generator).argsort(1)[:, :TOP_K].int()  # none for the last expert
    return x, torch.rand(TOKENS, TOP_K, generator=generator) + 0.1, ids


def block(weights: dict[str, Any], **options: Any) -> Any:
    def run(x: Tensor, routing: Tensor, ids: Tensor) -> Tensor:
        return moe_experts(x, routing, ids, quantisation="w8a8", **weights, **options)

    return run


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
    wide = {**weights, "w13_scale": bits(weights["w13_scale"]), "w2_scale": bits(weights["w2_scale"])}
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


def bits(scale: Tensor) -> Tensor:
    """float32 bits in the low half of int64, nothing in the high one."""
    words = [struct.unpack("<I", struct.pack("<f", value))[0] for value in scale.flatten().tolist()]
    return torch.tensor(words, dtype=torch.int64).reshape(scale.shape)


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
        assert torch.equal(got, bits(expected))
        assert (got >> 32 == 0).all() and (got < 0).sum() == 0


def computed(node: Any, known: tuple[Tensor, ...]) -> Tensor:
    """The value of a node that is made of one of the tensors ``known`` alone; its placeholder is told by its shape."""
    if node.op == "placeholder":
        (value,) = (t for t in known if t.shape == node.meta["val"].shape)
        return value
    args = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: computed(n, known))
    return node.target(*args[0], **args[1])
