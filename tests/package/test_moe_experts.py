"""The arguments of ``functional.moe_experts`` that serving stacks use: scales, weight on input, placement, counts."""

from __future__ import annotations

import re
from typing import Any

import pytest
import reference
import torch
from quantised_numbers import pack_int4, scale_bits, snr
from test_quantised_mlp import int8_model, weights
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_lowering import Deployment, MoE, quantise_experts
from moe_lowering.functional import check_expert_map, moe_experts

TOKENS, HIDDEN, INNER, EXPERTS = 13, 64, 32, 4
TWO = Deployment(ep_size=2, ep_rank=1, ep_group="g")


def case(top_k: int = 2, dtype: torch.dtype = torch.float32, lead: tuple[int, ...] = (TOKENS,)) -> tuple[Tensor, ...]:
    """x, weights, ids, w13, w2; unquantised."""
    torch.manual_seed(0)
    ids = torch.rand(*lead, EXPERTS).topk(top_k).indices
    w13, w2 = torch.randn(EXPERTS, HIDDEN, 2 * INNER) / 8, torch.randn(EXPERTS, INNER, HIDDEN) / 6
    return torch.randn(*lead, HIDDEN).to(dtype), torch.rand(*lead, top_k), ids, w13.to(dtype), w2.to(dtype)


def stored(form: str) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """Quantised weights as arguments, and what they stand for in float64."""
    given = weights(form)
    exact = tuple(given[name].double() * given[f"{name}_scale"].double().unsqueeze(1) for name in ("w13", "w2"))
    for name in ("w13", "w2"):
        given[name] = given[name].to(torch.int8) if form == "w8a8" else pack_int4(given[name])
    return {**given, "quantisation": form}, exact  # type: ignore[return-value]


def compiled_and_eager(function: Any, *arguments: Any) -> tuple[Any, Any]:
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    return compiled(*arguments), function(*arguments)


# quantised tokens


@pytest.mark.parametrize("lead", [(TOKENS,), (2, 5), (0,)], ids=str)
@pytest.mark.parametrize("form", ["w8a8", "w4a8"])
def test_int8_tokens_with_their_scales(form: str, lead: tuple[int, ...]) -> None:
    x, w, ids, *_ = case(lead=lead)
    experts, exact = stored(form)
    lines = [int8_model(row) for row in x.reshape(-1, HIDDEN)]
    q = torch.tensor([line[0] for line in lines], dtype=torch.int8).reshape(x.shape)
    scale = torch.tensor([float(line[1]) for line in lines]).reshape(lead)

    def run(q: Tensor, scale: Tensor) -> Tensor:
        return moe_experts(q, w, ids, **experts, pertoken_scale=scale, out_dtype=torch.bfloat16)

    y = run(q, scale)
    assert y.dtype == torch.bfloat16 and y.shape == x.shape
    # dispatch hands the same int8 rows to the experts as they make of floats themselves
    inside = moe_experts(x, w, ids, **experts)
    reference.assert_near(y, inside.double(), torch.bfloat16)
    if lead == (0,):
        return
    assert snr(y, reference.moe(x, w, ids, *exact)) > 34  # int8 rows, see INT8_ROWS_DB
    assert snr(run(q, scale.roll(1)), reference.moe(x, w, ids, *exact)) < 30
    seen, expected = compiled_and_eager(run, q, scale)
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("form", ["w8a8", "w4a8"])
def test_lists_and_scale_bits(form: str) -> None:
    x, w, ids, *_ = case()
    experts, _ = stored(form)
    expected = moe_experts(x, w, ids, **experts)
    lists = {name: list(value) if isinstance(value, Tensor) else value for name, value in experts.items()}
    assert torch.equal(moe_experts(x, w, ids, **lists), expected)
    as_bits = {name: scale_bits(experts[name]) for name in ("w13_scale", "w2_scale")}
    assert torch.equal(moe_experts(x, w, ids, **experts | as_bits), expected)


# weights on the input


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_on_input(dtype: torch.dtype) -> None:
    x, w, ids, w13, w2 = case(1, dtype)
    weighted = (x.double() * w.double()).to(dtype)  # one rounding
    expected = reference.moe(weighted, torch.ones_like(w), ids, w13, w2)

    def run(x: Tensor, w: Tensor, on_input: bool = True) -> Tensor:
        return moe_experts(x, w, ids, w13, w2, apply_router_weight_on_input=on_input)

    reference.assert_near(run(x, w), expected, dtype)
    assert reference.relative_error(run(x, w, False), expected) > 0.1  # SwiGLU is not linear
    seen, eager = compiled_and_eager(run, x, w)
    assert torch.equal(seen, eager)
    with pytest.raises(ValueError, match="apply_router_weight_on_input is True for k = 2; accepted: k = 1"):
        moe_experts(*case(2), apply_router_weight_on_input=True)


def test_weight_on_int8_input() -> None:
    _, w, ids, *_ = case(1)
    experts, exact = stored("w8a8")
    q = torch.randint(-127, 128, (TOKENS, HIDDEN), dtype=torch.int8)
    scale = torch.rand(TOKENS) / 50
    given: dict[str, Any] = {"pertoken_scale": scale, "out_dtype": torch.float32, **experts}
    y = moe_experts(q, w, ids, apply_router_weight_on_input=True, **given)
    expected = reference.moe(q * scale.double().unsqueeze(1) * w, torch.ones_like(w), ids, *exact)
    assert snr(y, expected) > 34
    assert snr(moe_experts(q, w, ids, **given), expected) < 20


# placement


def test_log2phy_with_redundant_experts() -> None:
    x, w, ids, w13, w2 = case()
    order = torch.tensor([3, 0, 2, 1, 0, 2])  # physical experts: which logical one each of them is
    for log2phy in (torch.tensor([4, 3, 5, 0]), torch.tensor([1, 3, 2, 0], dtype=torch.int32)):

        def run(x: Tensor, ids: Tensor, log2phy: Tensor = log2phy) -> Any:
            return moe_experts(x, w, ids, w13[order], w2[order], log2phy=log2phy, num_experts=6, return_counts=True)

        y, counts, kind = run(x, ids)
        reference.assert_near(y, reference.moe(x, w, ids, w13, w2), torch.float32)
        physical = [int(log2phy[i]) for i in ids.flatten().tolist()]
        assert counts.dtype == torch.int64 and kind == 1
        assert counts.tolist() == [physical.count(expert) for expert in range(6)]
        seen, eager = compiled_and_eager(run, x, ids)
        assert torch.equal(seen[0], eager[0]) and torch.equal(seen[1], eager[1])
    # experts of all ranks are counted from the weights when they are not given
    reference.assert_near(moe_experts(x, w, ids, w13[order], w2[order], log2phy=log2phy), y.double(), torch.float32)
    with pytest.raises(AssertionError, match="relative error"):
        reference.assert_near(moe_experts(x, w, ids, w13[order], w2[order]), y.double(), torch.float32)


def test_log2phy_mistakes() -> None:
    x, w, ids, w13, w2 = case()
    for log2phy in (torch.zeros(4), torch.zeros(1, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"log2phy is torch.*; accepted: int32 or int64 \[logical experts\]"):
            moe_experts(x, w, ids, w13, w2, log2phy=log2phy)
    for wrong in (-1, 4):  # neither wraps around
        ids[3, 1] = wrong
        with pytest.raises(IndexError, match="out of range"):
            moe_experts(x, w, ids, w13, w2, log2phy=torch.arange(4))


def test_expert_map() -> None:
    x, w, ids, w13, w2 = case()
    check_expert_map(torch.arange(4), 4)
    check_expert_map(torch.tensor([-1, -1, -1, 0, 1, 2], dtype=torch.int32), 6, TWO)
    for wrong, message in (
        (
            torch.tensor([0, 1, 2, -1, -1, -1]),
            "expert_map has 0 for expert 0 on EP rank 1; accepted: -1, as rank r holds",
        ),
        (
            torch.tensor([-1, -1, -1, 1, 0, 2]),
            r"has 1 for expert 3 on EP rank 1; accepted: 0, .* For another placement use log2phy",
        ),
        (torch.tensor([-1, -1, -1, 0, 1]), r"expert_map is torch.int64 of shape \[5\]; accepted: int32 or int64 \[6\]"),
        (torch.tensor([-1.0, -1, -1, 0, 1, 2]), "expert_map is torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            check_expert_map(wrong, 6, TWO)
    with FakeTensorMode():
        check_expert_map(torch.empty(6, dtype=torch.int64), 6, TWO)
        with pytest.raises(ValueError, match=r"of shape \[7\]"):
            check_expert_map(torch.empty(7, dtype=torch.int64), 6, TWO)

    def run(x: Tensor, expert_map: Tensor) -> Tensor:
        return moe_experts(x, w, ids, w13, w2, expert_map=expert_map)

    seen, eager = compiled_and_eager(run, x, torch.arange(4))
    assert torch.equal(seen, eager) and torch.equal(eager, moe_experts(x, w, ids, w13, w2))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="expert_map has 1 for expert 0 on EP rank 0"):
        torch.compile(run, backend="eager", fullgraph=True)(x, torch.tensor([1, 0, 2, 3]))


# counts, transposed weights, dtypes


def test_counts() -> None:
    x, w, ids, w13, w2 = case()
    mask = torch.arange(TOKENS) % 3 != 0
    y, counts, kind = moe_experts(x, w, ids, w13, w2, mask=mask, return_counts=True)
    assert torch.equal(y, moe_experts(x, w, ids, w13, w2, mask=mask)) and kind == 1
    assert counts.tolist() == [ids[mask].flatten().tolist().count(expert) for expert in range(EXPERTS)]


def test_transposed_weights() -> None:
    x, w, ids, w13, w2 = case()
    expected = moe_experts(x, w, ids, w13, w2)
    t13, t2 = w13.transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous()
    reference.assert_near(moe_experts(x, w, ids, t13, t2, need_trans=True), expected.double(), torch.float32)
    reference.assert_near(
        moe_experts(x, w, ids, list(t13), list(t2), need_trans=True), expected.double(), torch.float32
    )
    with pytest.raises(ValueError, match=r"grouped_mlp: w2 has shape"):
        moe_experts(x, w, ids, t13, t2)
    experts, _ = stored("w8a8")
    turned = {name: experts[name].transpose(1, 2).contiguous() for name in ("w13", "w2")}
    assert torch.equal(moe_experts(x, w, ids, **experts | turned, need_trans=True), moe_experts(x, w, ids, **experts))
    packed, _ = stored("w4a8")
    with pytest.raises(ValueError, match="need_trans is True for w13 of w4a8; accepted: False, as packed int4 cannot"):
        moe_experts(x, w, ids, **packed, need_trans=True)


@pytest.mark.parametrize(
    ("name", "stacked", "said"), [("w13", True, "w13"), ("w2", True, "w2"), ("w2", False, r"w2\[0\]")]
)
def test_weights_of_another_dtype_than_x_are_named(name: str, stacked: bool, said: str) -> None:
    x, w, ids, w13, w2 = case()[:5]
    given = {"w13": w13, "w2": w2}
    given[name] = given[name].bfloat16()
    if not stacked:
        given = {each: list(tensor) for each, tensor in given.items()}
    with pytest.raises(TypeError, match=rf"^moe_experts: {said} is torch.bfloat16, and x is torch.float32; accepted"):
        moe_experts(x, w, ids, **given)


def test_a_layer_names_the_dtypes_of_x_and_of_its_weights() -> None:
    layer = MoE(64, 32, 4, 2, dtype=torch.bfloat16)
    with pytest.raises(
        TypeError, match=r"^MoE: x is torch.float32, and the layer's weights are torch.bfloat16; accepted: x of"
    ):
        layer(torch.ones(3, 64))
    assert layer(torch.ones(3, 64).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("quantisation", ["w8a8", "w4a8", "w4a16"])
def test_a_quantised_layer_takes_x_of_its_own_dtype(quantisation: str) -> None:
    """Its experts do not say that any more, and its gate does; the experts of a function have no gate."""
    layer = quantise_experts(MoE(64, 64, 4, 2, dtype=torch.bfloat16), quantisation)
    x, ids, names = (
        torch.ones(3, 64).bfloat16(),
        torch.tensor([[0, 1], [1, 2], [3, 0]]),
        ("w13", "w2", "w13_scale", "w2_scale"),
    )
    assert layer(x).dtype == torch.bfloat16
    for other in (torch.float16, torch.float32):
        with pytest.raises(
            TypeError, match=rf"^MoE: x is {other}, and the layer's gate is torch.bfloat16; accepted: x of"
        ):
            layer(x.to(other))
    given = {name: getattr(layer, name) for name in names}
    y = moe_experts(x, torch.ones(3, 2), ids, **given, quantisation=quantisation)
    assert y.dtype == torch.bfloat16
    if quantisation == "w4a16":
        message = "^moe_experts: x is torch.float16, and w13_scale is torch.bfloat16; accepted for w4a16: one dtype"
        with pytest.raises(TypeError, match=message):
            moe_experts(x.half(), torch.ones(3, 2), ids, **given, quantisation=quantisation)
    else:  # the twin: float32 scales go with x of any float
        assert moe_experts(x.half(), torch.ones(3, 2), ids, **given, quantisation=quantisation).dtype == torch.float16


class OwnGate(torch.nn.Linear):
    """The usual router: logits in float32, whatever the layer is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x.float(), self.weight.float())


@pytest.mark.parametrize("quantisation", [None, "w8a8", "w4a8", "w4a16"])
def test_a_gate_of_ones_own_says_nothing_of_x(quantisation: str | None) -> None:
    layer = MoE(64, 64, 4, 2, dtype=torch.bfloat16)
    layer = layer if quantisation is None else quantise_experts(layer, quantisation)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected, plain = layer(x), layer.gate
    layer.gate = torch.nn.Sequential(plain)  # has no weight
    assert torch.equal(layer(x), expected)
    layer.gate = OwnGate(64, 4, bias=False).to(torch.float32)
    layer.gate.weight.data.copy_(plain.weight.data.float())
    assert layer(x).dtype == torch.bfloat16
    assert layer.to("meta")(x.to("meta")).shape == (3, 64)


def test_autocast_casts_for_the_gate() -> None:
    layer = quantise_experts(MoE(64, 64, 4, 2, dtype=torch.bfloat16), "w8a8")
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(3, 64)).dtype == torch.float32
    with pytest.raises(TypeError, match=r"^MoE: x is torch.float32, and the layer's gate is torch.bfloat16"):
        layer(torch.ones(3, 64))


@pytest.mark.parametrize("need_trans", [False, True])
def test_a_matrix_is_one_expert(need_trans: bool) -> None:
    x, _, _, w13, w2 = case()[:5]
    weights, ids = torch.ones(len(x), 1), torch.zeros(len(x), 1, dtype=torch.int32)
    whole = (w13[:1], w2[:1])
    given = [w.transpose(-2, -1).contiguous() for w in whole] if need_trans else whole
    y = moe_experts(x, weights, ids, given[0][0], given[1][0], need_trans=need_trans)
    torch.testing.assert_close(y, moe_experts(x, weights, ids, *whole))


def test_experts_that_are_not_quantised_are_named() -> None:
    x, w, ids, w13, w2 = case()[:5]
    scales = {"w13_scale": torch.ones(4, 128), "w2_scale": torch.ones(4, 64)}
    with pytest.raises(
        TypeError, match=r"^moe_experts: w13 is torch.float32 for quantisation 'w8a8'; accepted: torch.int8, as"
    ):
        moe_experts(x, w, ids, w13, w2, quantisation="w8a8", **scales)
    with pytest.raises(TypeError, match=r"^moe_experts: w13\[0\] is torch.float32 for quantisation 'w8a8'"):
        moe_experts(x, w, ids, list(w13), list(w2), quantisation="w8a8", **scales)


@pytest.mark.parametrize(("name", "change", "message"), [
    ("w13", lambda w: w[0, 0], "moe_experts: w13 has 1 dimension; accepted: a tensor [E_local, H, 2I], or a sequence of"),
    ("w2", lambda w: w[None], "moe_experts: w2 has 4 dimensions; accepted: a tensor [E_local, I, H], or a sequence of"),
    ("w2", lambda w: [], "moe_experts: w2 is []; accepted: a tensor of all experts, or a sequence"),
    ("w2", lambda w: w[:3], "grouped_mlp: w2 has shape [3, "),
    ("w2", lambda w: [*w[:3], w[3].t()[:5]], "grouped_mlp: w2[3] has shape [5, "),
    ("w13_bias", lambda _: torch.ones(5), "grouped_mlp: w13_bias has shape [5]; accepted: one tensor [4, "),
    ("w13_bias", lambda _: [torch.ones(5)] * 3, "grouped_mlp: w13_bias has 3 tensors; accepted: one tensor [4, "),
])  # fmt: skip
def test_what_is_wrong_is_called_as_the_caller_gave_it(name: str, change: Any, message: str) -> None:
    """A plain tensor by its argument's name, one of a list by its index too."""
    x, w, ids, w13, w2 = case()[:5]
    given = {"w13": w13, "w2": w2}
    with pytest.raises((TypeError, ValueError), match="^" + re.escape(message)):
        moe_experts(x, w, ids, **given | {name: change(given.get(name))})


SCALE = {"pertoken_scale": torch.ones(TOKENS)}


@pytest.mark.parametrize(
    ("dtype", "changes", "message"),
    [
        (torch.float64, {}, "x is torch.float64; accepted: float32, float16, bfloat16, int8"),
        (torch.int32, {}, "x is torch.int32; accepted: float32, float16, bfloat16, int8"),
        (torch.uint8, {}, "x is torch.uint8; accepted"),
        (torch.float32, SCALE, "pertoken_scale is given for x of torch.float32; accepted: one for int8, None else"),
        (torch.int8, {"out_dtype": torch.float32}, "pertoken_scale is None for x of torch.int8"),
        (torch.int8, SCALE, "out_dtype is None for int8 x; accepted: float32, float16, bfloat16"),
        (torch.int8, {**SCALE, "quantisation": "none"}, "x is int8 for quantisation 'none'; accepted: 'w8a8', 'w4a8'"),
        (torch.float32, {"out_dtype": torch.float16}, "out_dtype is torch.float16 for x of torch.float32"),
        (torch.float32, {"quantisation": "w4a16"}, "x is torch.float32 for quantisation 'w4a16'; accepted: float16"),
        (torch.float32, {"quantisation": "none"}, "moe_experts: w13 is torch.int8, and x is torch.float32"),
        (torch.float32, {"w13_scale": None}, r"w13_scale is None for w8a8; accepted: \[4, 64\]"),
    ],
)
def test_dtype_mistakes(dtype: torch.dtype, changes: dict[str, Any], message: str) -> None:
    x, w, ids, *_ = case()
    experts, _ = stored("w8a8")
    with pytest.raises((TypeError, ValueError), match=message):
        moe_experts((x * 9).to(dtype), w, ids, **experts | changes)
