"""What every generic operator owes torch and its callers: torch's own checks, errors, and behaviour in graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from generic_calls import random_ids
from mlp_arguments import MLP, QUANTISED_MISTAKES, W4A8, W4A16, W8A8
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_lowering.functional as functional
from moe_lowering import Deployment

ops = torch.ops.moe_lowering
ONE_RANK = ("", 1, "", 1, 0)  # ep_group, ep_size, tp_group, tp_size, max_tokens


def handle_of(x: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
    return ops.dispatch(x, None, ids, mask, 4, *ONE_RANK, 0)[3]


# torch's own checks: schema, autograd registration, fake against real, AOT with dynamic shapes


def opcheck_samples() -> list[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    torch.manual_seed(0)
    x, ids = torch.randn(6, 8), random_ids((6,), 4, 2)
    mask = torch.tensor([True, False, True, True, False, True])
    weights, handle = torch.rand(6, 2), handle_of(x, ids, None)
    quantised = torch.randint(-128, 127, (6, 8), dtype=torch.int8)
    w13, w2 = torch.randn(4, 8, 12), torch.randn(4, 6, 8)
    b13, b2 = torch.randn(4, 12), torch.randn(4, 8)
    rows, none, counts = torch.randn(12, 8), torch.empty(0), torch.tensor([3, 0, 5, 2])
    tail = ("swiglu", 0.0, 1.702, False)
    quantised_mlps = [
        ("grouped_mlp-w8a8", torch.float32, W8A8 | {"w2_scale": [torch.ones(4, 8).bfloat16()]}),
        ("grouped_mlp-w8a8-rows", torch.int8, W8A8 | {"row_scale": torch.rand(12), "out_dtype": torch.bfloat16}),
        ("grouped_mlp-w8a8-smooth", torch.bfloat16, W8A8 | {"h_smooth": torch.rand(4, 8)}),
        ("grouped_mlp-w8a8-clip", torch.bfloat16, W8A8 | {"h_clip": torch.rand(4)}),
        ("grouped_mlp-w4a8", torch.float16, W4A8),
        ("grouped_mlp-w4a8-lists", torch.bfloat16, {n: list(v[0]) if type(v) is list else v for n, v in W4A8.items()}),
        ("grouped_mlp-w4a16", torch.float16, W4A16),
    ]
    return [
        *(
            (name, ops.grouped_mlp, tuple((MLP | change | {"rows": (rows * 9).to(dtype), "counts": counts}).values()))
            for name, dtype, change in quantised_mlps
        ),
        ("route", ops.route, (torch.randn(6, 8), None, 2, "softmax", True, 1, 1, "top2_sum", 1.0)),
        ("route-groups", ops.route, (torch.randn(2, 3, 8), torch.randn(8), 2, "sigmoid", False, 4, 2, "max", 2.5)),
        ("route-bf16", ops.route, (torch.randn(0, 8).bfloat16(), None, 8, "sqrtsoftplus", True, 2, 2, "top2_sum", 1.0)),
        ("route-epsilon", ops.route, (torch.randn(6, 8), None, 2, "sigmoid", True, 1, 1, "max", 1.0, 0.0)),
        ("dispatch", ops.dispatch, (x, None, ids, None, 4, *ONE_RANK, 0)),
        ("dispatch-mask", ops.dispatch, (x.view(2, 3, 8), None, ids.view(2, 3, 2), mask.view(2, 3), 4, *ONE_RANK, 11)),
        ("dispatch-int8", ops.dispatch, (quantised, torch.rand(6), ids, mask, 4, "", 1, "", 1, 9, 0)),
        ("dispatch-smooth", ops.dispatch, (x, None, ids, mask, 4, *ONE_RANK, 0, 0, 1, False, torch.rand(4, 8))),
        ("grouped_mlp", ops.grouped_mlp, (rows, none, counts, [w13], [w2], [], [], *tail)),
        (
            "grouped_mlp-lists",
            ops.grouped_mlp,
            (rows, none, counts, list(w13), list(w2), list(b13), list(b2), "swiglu_oai", 7.0, 1.702, True),
        ),
        ("grouped_mlp-bias", ops.grouped_mlp, (rows, none, counts, [w13], [w2], [b13], [b2], "gelu", 0.0, 1.0, False)),
        ("combine", ops.combine, (rows, weights, ids, handle, None, 4, *ONE_RANK)),
        ("combine-bf16", ops.combine, (rows, weights.bfloat16(), ids, handle, None, 4, *ONE_RANK)),
        (
            "combine-mask",
            ops.combine,
            (rows[:8], weights, ids, handle_of(x, ids, mask)[:8], mask, 4, *ONE_RANK),
        ),
        ("assert_tokens", ops.assert_tokens, (x, 1, 8)),
        ("assert_agreement", ops.assert_agreement, (x, "ep", -1.0, "{}", "{}")),
    ]


SAMPLES = opcheck_samples()
DIFFERENTIABLE = [
    sample
    for sample in SAMPLES
    if sample[0] not in ("dispatch-int8", "dispatch-smooth", "assert_tokens", "assert_agreement")
]


@pytest.mark.parametrize(("op", "arguments"), [s[1:] for s in SAMPLES], ids=[s[0] for s in SAMPLES])
def test_opcheck(op: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(op.default, arguments)  # type: ignore[attr-defined]


def wants_gradient(value: Any) -> Any:
    if isinstance(value, list):
        return [wants_gradient(item) for item in value]
    if isinstance(value, Tensor) and value.dtype.is_floating_point:
        return value.detach().clone().requires_grad_()
    return value


@pytest.mark.parametrize(("op", "arguments"), [s[1:] for s in DIFFERENTIABLE], ids=[s[0] for s in DIFFERENTIABLE])
def test_backward_raises(op: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    inputs = tuple(wants_gradient(value) for value in arguments)
    torch.library.opcheck(op.default, inputs, test_utils="test_autograd_registration")  # type: ignore[attr-defined]
    out = op(*inputs)
    first = out[0] if isinstance(out, tuple) else out
    assert first.requires_grad
    with pytest.raises(NotImplementedError, match="is for inference"):
        first.sum().backward()


# static mistakes: the fake kernel and the CPU kernel say the same

X, IDS = torch.ones(4, 8), torch.tensor([[0, 1]] * 4, dtype=torch.int32)
ROUTE: dict[str, Any] = {
    "logits": torch.ones(4, 8),
    "bias": None,
    "top_k": 2,
    "scoring": "softmax",
    "renormalize": True,
    "num_groups": 1,
    "topk_groups": 1,
    "group_score": "max",
    "scale": 1.0,
}
DISPATCH: dict[str, Any] = {
    "x": X,
    "x_scale": None,
    "ids": IDS,
    "mask": None,
    "num_experts": 4,
    "ep_group": "",
    "ep_size": 1,
    "tp_group": "",
    "tp_size": 1,
    "max_tokens": 0,
    "max_rows": 0,
}
COMBINE: dict[str, Any] = {
    "rows": torch.ones(8, 8),
    "weights": torch.ones(4, 2),
    "ids": IDS,
    "handle": torch.zeros(8, 3, dtype=torch.int32),
    "mask": None,
    "num_experts": 4,
    "ep_group": "",
    "ep_size": 1,
    "tp_group": "",
    "tp_size": 1,
    "max_tokens": 0,
}
MISTAKES: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    *QUANTISED_MISTAKES,
    ("route", ROUTE, {"top_k": 9}, "top_k is 9; accepted: 1 to 8"),
    ("route", ROUTE, {"top_k": 0}, "top_k is 0; accepted: 1 to 8"),
    ("route", ROUTE, {"logits": torch.ones(4, 8, dtype=torch.int32)}, "logits is torch.int32"),
    ("route", ROUTE, {"bias": torch.ones(7)}, r"bias has shape \[7\]; accepted: \[8\]"),
    ("route", ROUTE, {"scoring": "tanh"}, "scoring is 'tanh'; accepted: softmax, sigmoid, sqrtsoftplus"),
    ("route", ROUTE, {"group_score": "sum"}, "group_score is 'sum'; accepted: max, top2_sum"),
    ("route", ROUTE, {"epsilon": -1e-6}, "epsilon is -1e-06; accepted: a finite number, 0 or more"),
    ("route", ROUTE, {"epsilon": float("nan")}, "epsilon is nan; accepted: a finite number, 0 or more"),
    ("route", ROUTE, {"num_groups": 3}, "num_groups is 3; accepted: a divisor of 8"),
    ("route", ROUTE, {"num_groups": 4, "topk_groups": 5}, "topk_groups is 5; accepted: 1 to num_groups, 4"),
    ("route", ROUTE, {"num_groups": 4, "topk_groups": 1, "top_k": 3}, r"top_k is 3; accepted: at most .* 1 \* 2"),
    (
        "route",
        ROUTE,
        {"num_groups": 8, "topk_groups": 2, "group_score": "top2_sum"},
        "'top2_sum' with 1 expert per group",
    ),
    (
        "dispatch",
        DISPATCH,
        {"num_experts": 6, "ep_size": 4, "ep_group": "g"},
        "num_experts is 6; accepted: a multiple of",
    ),
    ("dispatch", DISPATCH, {"ep_size": 2}, "ep_group is '' for 2 ranks"),
    ("dispatch", DISPATCH, {"tp_size": 2, "tp_group": "g"}, "tp_size is 2; accepted: a divisor of ep_size, 1"),
    ("dispatch", DISPATCH, {"max_tokens": -1}, "max_tokens is -1"),
    ("dispatch", DISPATCH, {"max_rows": -1}, "max_rows is -1"),
    ("dispatch", DISPATCH, {"ids": IDS.long()}, "ids is torch.int64; accepted: int32"),
    ("dispatch", DISPATCH, {"ids": IDS[:3]}, r"ids has shape \[3, 2\]"),
    ("dispatch", DISPATCH, {"ids": torch.zeros(4, 5, dtype=torch.int32)}, "k from 1 to 4"),
    ("dispatch", DISPATCH, {"x": X.double()}, "x is torch.float64"),
    ("dispatch", DISPATCH, {"x": X.to(torch.int8)}, "x is int8 and x_scale is None"),
    ("dispatch", DISPATCH, {"x_scale": torch.ones(4, 1)}, r"x_scale has shape \[4, 1\]; accepted: \[4\]"),
    ("dispatch", DISPATCH, {"x_scale": torch.ones(4).half()}, "x_scale is torch.float16; accepted: float32"),
    ("dispatch", DISPATCH, {"mask": torch.ones(3, dtype=torch.bool)}, r"mask has shape \[3\]; accepted: \[4\]"),
    ("dispatch", DISPATCH, {"x_smooth": torch.ones(1, 8)}, r"x_smooth has shape \[1, 8\]; accepted: \[4, 8\]"),
    ("dispatch", DISPATCH, {"x_smooth": torch.ones(4, 8).half()}, "x_smooth is torch.float16; accepted: float32"),
    (
        "dispatch",
        DISPATCH,
        {"x": X.to(torch.int8), "x_scale": torch.ones(4), "x_smooth": torch.ones(4, 8)},
        "x_smooth is given for tokens that are int8 already",
    ),
    ("dispatch", DISPATCH, {"mask": torch.ones(4)}, "mask is torch.float32; accepted: bool"),
    ("grouped_mlp", MLP, {"rows": torch.ones(8, 7)}, r"w13 has shape \[4, 8, 12\]; accepted: \[4, 7, 12\]"),
    ("grouped_mlp", MLP, {"rows": torch.ones(8, 8).half()}, r"w13 is torch.float32; accepted: torch.float16"),
    (
        "grouped_mlp",
        MLP,
        {"row_scale": torch.ones(8)},
        r"row_scale has shape \[8\] for rows of torch.float32; accepted:",
    ),
    ("grouped_mlp", MLP, {"counts": torch.ones(4)}, "counts is torch.float32"),
    ("grouped_mlp", MLP, {"counts": torch.tensor([1, 1])}, r"w13 has shape \[4, 8, 12\]; accepted: \[2, 8, 12\]"),
    ("grouped_mlp", MLP, {"w13": [torch.ones(8, 12)] * 3}, "w13 has 3 tensors; accepted: one tensor"),
    ("grouped_mlp", MLP, {"w13": [torch.ones(4, 8, 13)]}, "w13 has 13 columns; accepted: an even number"),
    ("grouped_mlp", MLP, {"w13": []}, "w13 holds no matrix"),
    ("grouped_mlp", MLP, {"w2": [torch.ones(4, 12, 8)]}, r"w2 has shape \[4, 12, 8\]; accepted: \[4, 6, 8\]"),
    ("grouped_mlp", MLP, {"w13_bias": [torch.ones(4, 6)]}, r"w13_bias has shape \[4, 6\]"),
    ("grouped_mlp", MLP, {"w2_bias": [torch.ones(4, 8).half()]}, r"w2_bias is torch.float16"),
    ("grouped_mlp", MLP, {"activation": "reglu"}, "activation is 'reglu'; accepted: swiglu, "),
    ("grouped_mlp", MLP, {"activation": "swiglu_clamp"}, "limit is 0.0 for swiglu_clamp; accepted: more than 0"),
    ("grouped_mlp", MLP, {"limit": 7.0}, "limit is 7.0 for swiglu, which has none"),
    (
        "combine",
        COMBINE,
        {"weights": torch.ones(4, 2).double()},
        "weights is torch.float64; accepted: float32, float16",
    ),
    ("combine", COMBINE, {"weights": torch.ones(4, 1)}, r"weights has shape \[4, 1\]"),
    ("combine", COMBINE, {"handle": torch.zeros(7, 3, dtype=torch.int32)}, r"handle has shape \[7, 3\]"),
    ("combine", COMBINE, {"handle": torch.zeros(8, 3)}, "handle is torch.float32; accepted: int32"),
    ("combine", COMBINE, {"rows": torch.ones(2, 4, 8)}, r"rows has shape \[2, 4, 8\]"),
    ("combine", COMBINE, {"rows": torch.ones(8, 8, dtype=torch.int8)}, "rows is torch.int8"),
    ("combine", COMBINE, {"num_experts": 5, "ep_size": 2, "ep_group": "g"}, "num_experts is 5"),
]


@pytest.mark.parametrize(("name", "good", "change", "message"), MISTAKES)
def test_static_mistakes(name: str, good: dict[str, Any], change: dict[str, Any], message: str) -> None:
    op = getattr(ops, name)
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=f"^{name}: .*{message}") as on_cpu:
        op(**good | change)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(value: Any) -> Any:
            if isinstance(value, list):
                return [fake(item) for item in value]
            return mode.from_tensor(value) if isinstance(value, Tensor) else value

        op(**{key: fake(value) for key, value in good.items()})
        with pytest.raises(type(on_cpu.value)) as on_fake:
            op(**{key: fake(value) for key, value in (good | change).items()})
    assert str(on_fake.value) == str(on_cpu.value)


def test_unknown_group_is_named() -> None:
    with pytest.raises(ValueError, match="ep_group is 'nowhere', which names no process group here"):
        ops.dispatch(**DISPATCH | {"ep_size": 2, "ep_group": "nowhere"})


# graphs


def test_assert_tokens_stays_in_the_graph() -> None:
    def model(x: Tensor) -> Tensor:
        ops.assert_tokens.default(x, 2, 6)
        return x + 1

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        assert torch.equal(compiled(torch.zeros(3, 4)), torch.ones(3, 4))
        with pytest.raises(
            RuntimeError,
            match="T is 7, but this graph was lowered for T from 2 to 6; compile again for this T",
        ):
            compiled(torch.zeros(7, 4))


def test_assert_tokens_counts_all_leading_dimensions() -> None:
    ops.assert_tokens(torch.zeros(2, 3, 4), 6, 6)
    ops.assert_tokens(torch.zeros(4), 1, 1)
    ops.assert_tokens(torch.zeros(7, 4, device="meta"), 1, 2)  # fake kernels do nothing
    with pytest.raises(RuntimeError, match="T is 6"):
        ops.assert_tokens(torch.zeros(2, 3, 4), 7, 9)
    with pytest.raises(RuntimeError, match="the Deployment's min_tokens is 1 and its max_tokens 9: for T outside of"):
        ops.assert_tokens(torch.zeros(2, 3, 4), 7, 9, min_tokens=1, max_tokens=9)
    ops.assert_tokens(torch.zeros(2, 4, 4), 7, 9, min_tokens=1, max_tokens=2)  # they are for the message only
    with pytest.raises(ValueError, match="lo is 3 and hi is 2"):
        ops.assert_tokens(torch.zeros(4, device="meta"), 3, 2)


@pytest.mark.parametrize("name", ["dispatch", "combine", "assert_agreement", "assert_tokens", "dispatch_ffn_combine"])
def test_unused_calls_survive_dead_code_elimination(name: str) -> None:
    for target in (getattr(ops, name), getattr(ops, name).default):
        graph = torch.fx.Graph()
        graph.call_function(target, (graph.placeholder("x"),))
        graph.output(())
        graph.eliminate_dead_code()
        assert target in [node.target for node in graph.nodes]
    graph = torch.fx.Graph()
    graph.call_function(ops.route.default, (graph.placeholder("x"),))
    graph.output(())
    graph.eliminate_dead_code()
    assert ops.route.default not in [node.target for node in graph.nodes]


@pytest.mark.parametrize("capped", [False, True])
def test_compiles_once_for_all_sizes(capped: bool) -> None:

    deployment = Deployment(max_rows=1000) if capped else None
    w13, w2, gate = torch.randn(8, 16, 24), torch.randn(8, 12, 16), torch.randn(8, 16)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, inputs)

    def model(x: Tensor, mask: Tensor) -> Tensor:
        weights, ids = functional.route(torch.nn.functional.linear(x, gate), 2)
        return functional.moe_experts(x, weights, ids, w13, w2, mask=mask, deployment=deployment)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (20, 24, 33):  # none is another size of the model: dynamo gives equal sizes one symbol
            x, mask = torch.randn(tokens, 16), torch.rand(tokens) > 0.5
            torch.testing.assert_close(compiled(x, mask), model(x, mask))
    assert len(graphs) == 1
    targets = [node.target for node in graphs[0].graph.nodes]
    for name in ("route", "dispatch", "grouped_mlp", "combine"):
        assert targets.count(getattr(ops, name).default) == 1
