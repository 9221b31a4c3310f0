"""Random edits of graphs with a router: insert, rewire, change a constant, give a value to the outside."""

from __future__ import annotations

import copy
import operator
import random
from typing import Any

import torch
from router_forms import FORMS
from router_graphs import arguments, logits_of, trace
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

aten = torch.ops.aten
TOKENS = 12  # no other size of the graphs
_GENERIC = "moe_lowering"
_INSERTED: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.relu.default, (), {}),
    (aten.neg.default, (), {}),
    (aten.mul.Tensor, (2.0,), {}),
    (aten.mul.Tensor, (1.0,), {}),
    (aten.add.Tensor, (1e-3,), {}),
    (aten.sigmoid.default, (), {}),
    (aten._softmax.default, (-1, False), {}),
    (aten._softmax.default, (0, False), {}),
    (aten.clone.default, (), {}),
    (aten._to_copy.default, (), {"dtype": torch.bfloat16}),
    (aten._to_copy.default, (), {"dtype": torch.float32}),
    (aten._to_copy.default, (), {"dtype": torch.int64}),
    (aten.flip.default, ([-1],), {}),
    (aten.flip.default, ([0],), {}),
    (aten.bitwise_not.default, (), {}),
    (aten.abs.default, (), {}),
    (aten.clamp.default, (0.1,), {}),
    (aten.square.default, (), {}),
]
_NUMBERS = [0, 1, 2, 3, 4, -1, 0.0, 1.0, 0.5, 1e-3, 2.5, -1.0, float("-inf"), True, False]


def base_graphs() -> dict[str, GraphModule]:
    """The graph of each form, on ``TOKENS`` tokens."""
    return {name: trace(form.router, logits_of(tokens=TOKENS)) for name, form in FORMS.items()}


def _router_nodes(gm: GraphModule) -> list[Node]:
    return [
        node
        for node in gm.graph.nodes
        if node.op == "call_function"
        and node.all_input_nodes
        and (node.target is operator.getitem or getattr(node.target, "namespace", "") == "aten")
        and _GENERIC not in str(node.args)
    ]


def edit(base: GraphModule, draw: random.Random) -> GraphModule | None:
    """A changed copy with the values of its nodes made anew; None where the change makes no graph that can run."""
    gm = copy.deepcopy(base)
    for _ in range(draw.choice((1, 1, 1, 2))):
        draw.choice((_insert, _insert, _rewire, _rewire, _renumber, _renumber, _give))(gm, draw)
    try:
        gm.graph.lint()
        gm.recompile()
        mode = FakeTensorMode()
        given = [mode.from_tensor(each) for each in arguments(logits_of(tokens=TOKENS))]
        FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*given)
    except Exception:  # the operators themselves refuse what was drawn
        return None
    return gm


def _insert(gm: GraphModule, draw: random.Random) -> None:
    user = draw.choice(_router_nodes(gm))
    source = draw.choice(user.all_input_nodes)
    target, args, kwargs = draw.choice(_INSERTED)
    with gm.graph.inserting_before(user):
        node = gm.graph.call_function(target, (source, *args), kwargs)
    user.replace_input_with(source, node)


def _rewire(gm: GraphModule, draw: random.Random) -> None:
    user = draw.choice([node for node in gm.graph.nodes if node.op == "call_function" and node.all_input_nodes])
    source = draw.choice(user.all_input_nodes)
    others = [node for node in gm.graph.nodes if node < user and node is not source and _alike(node, source)]
    if others:
        user.replace_input_with(source, draw.choice(others))


def _alike(a: Node, b: Node) -> bool:
    first, second = a.meta.get("val"), b.meta.get("val")
    return isinstance(first, Tensor) and isinstance(second, Tensor) and first.shape == second.shape


def _renumber(gm: GraphModule, draw: random.Random) -> None:
    nodes = [n for n in _router_nodes(gm) if any(isinstance(a, (int, float, bool)) for a in n.args)]
    node = draw.choice(nodes)
    at = draw.choice([i for i, a in enumerate(node.args) if isinstance(a, (int, float, bool))])
    node.args = (*node.args[:at], draw.choice(_NUMBERS), *node.args[at + 1 :])


def _give(gm: GraphModule, draw: random.Random) -> None:
    node = draw.choice([n for n in _router_nodes(gm) if isinstance(n.meta.get("val"), Tensor)])
    (output,) = gm.graph.find_nodes(op="output")
    output.args = ((*output.args[0], node),)


class LowerIdFirst(Interpreter):
    """Runs a graph in which selections take the lower index among equals, as ``route`` does."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is aten.topk.default:
            x, k, dim, largest = (*args, *(-1, True)[len(args) - 2 :])[:4]
            values, ids = torch.sort(x, dim=dim, descending=bool(largest), stable=True)
            return values.narrow(dim, 0, k), ids.narrow(dim, 0, k)
        return super().call_function(target, args, kwargs)


def run(gm: GraphModule) -> tuple[Tensor, ...] | None:
    """The outputs; None where an operator refuses its arguments (ids twice, or out of range)."""
    try:
        with torch.no_grad():
            return LowerIdFirst(gm).run(*arguments(logits_of(tokens=TOKENS)))  # type: ignore[no-any-return]
    except (ValueError, RuntimeError, IndexError, TypeError):
        return None


def differences(lowered: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[str]:
    """Outputs that are not equal, but for rounding and for the order of the chosen experts in weights and ids."""
    found = []
    for at, (new, old) in enumerate(zip(lowered, expected, strict=True)):
        a, b = new.double(), old.double()
        if a.dim() and at:
            a, b = a.sort(-1).values, b.sort(-1).values
        scale = float(b.nan_to_num(0, 0, 0).abs().max()) if b.numel() else 0.0
        if new.dtype != old.dtype or not torch.allclose(a, b, rtol=2e-5, atol=2e-5 * scale + 1e-12, equal_nan=True):
            found.append(f"output {at}")
    return found
