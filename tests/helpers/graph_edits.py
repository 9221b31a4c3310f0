"""Random edits of a traced graph: insert, delete, rewire, change a constant, duplicate a reader, swap results."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

aten = torch.ops.aten


def values(gm: GraphModule) -> None:
    """Gives every node its fake value anew.

    Raises:
        Exception: whatever a node that no longer fits raises.
    """
    inputs = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
    mode = next(each.fake_mode for each in inputs if isinstance(each, torch._subclasses.FakeTensor))
    assert isinstance(mode, FakeTensorMode)
    FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*inputs)


def edit(gm: GraphModule, draw: random.Random) -> str:
    """One random edit in place; says which, "" when the one that was drawn does not apply."""
    kind = draw.choice([*_EDITS])
    done = _EDITS[kind](gm, draw)
    return f"{kind}: {done}" if done else ""


def _calls(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)]


def _insert(gm: GraphModule, draw: random.Random) -> str:
    node = draw.choice([n for n in gm.graph.nodes if isinstance(n.meta.get("val"), Tensor)])
    floats = node.meta["val"].is_floating_point()
    choices: list[tuple[Any, tuple[Any, ...]]] = [
        (aten.neg.default, ()),
        (aten.mul.Tensor, (2,)),
        (aten.add.Tensor, (1,)),
        (aten.flip.default, ([0],)),
        (aten.clone.default, ()),
        (aten.roll.default, ([1], [0])),
        (aten.abs.default, ()),
    ]
    choices += [(op.default, ()) for op in (aten.relu, aten.silu, aten.sigmoid, aten.gelu)] if floats else []
    target, rest = draw.choice(choices)
    place = node.next if node.op != "placeholder" else _first_call(gm)
    with gm.graph.inserting_before(place):
        made = gm.graph.call_function(target, (node, *rest))
    users = [user for user in node.users if user is not made]
    if draw.random() < 0.5 and len(users) > 1:
        users = [draw.choice(users)]
    for user in users:
        user.replace_input_with(node, made)
    return f"{target} after {node}"


def _first_call(gm: GraphModule) -> Node:
    return next(node for node in gm.graph.nodes if node.op != "placeholder")


def _alike(a: Node, b: Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    return isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype


def _delete(gm: GraphModule, draw: random.Random) -> str:
    node = draw.choice(_calls(gm))
    sources = [source for source in node.all_input_nodes if _alike(node, source)]
    if not sources:
        return ""
    source = draw.choice(sources)
    node.replace_all_uses_with(source)
    gm.graph.erase_node(node)
    return f"{node} for {source}"


def _rewire(gm: GraphModule, draw: random.Random) -> str:
    node = draw.choice(_calls(gm))
    old = draw.choice(node.all_input_nodes or [node])
    others = [n for n in gm.graph.nodes if n < node and n is not old and _alike(n, old)]
    if not others:
        return ""
    new = draw.choice(others)
    node.replace_input_with(old, new)
    return f"{node} reads {new} for {old}"


def _constant(gm: GraphModule, draw: random.Random) -> str:
    node = draw.choice(_calls(gm) + [n for n in gm.graph.nodes if n.op == "call_function"])
    places = [at for at, arg in enumerate(node.args) if isinstance(arg, (bool, int, float, list))]
    if not places or node.target is operator.getitem:
        return ""
    at = draw.choice(places)
    args = list(node.args)
    args[at] = _changed(args[at], draw)
    node.args = tuple(args)
    return f"{node} has {args[at]} at {at}"


def _changed(value: Any, draw: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return draw.choice([value + 1, value - 1, -value, value * 2])
    if isinstance(value, list) and value and all(isinstance(each, int) for each in value):
        changed = [*value]
        at = draw.randrange(len(changed))
        if draw.random() < 0.5:
            draw.shuffle(changed)
        else:
            changed[at] = _changed(changed[at], draw)
        return changed
    return value


def _duplicate(gm: GraphModule, draw: random.Random) -> str:
    node = draw.choice(_calls(gm))
    output = next(iter(reversed(gm.graph.nodes)))
    before = output.args[0]
    output.args = ((*(before if isinstance(before, (list, tuple)) else (before,)), node),)
    return f"{node} is returned"


def _swap(gm: GraphModule, draw: random.Random) -> str:
    items = [n for n in gm.graph.nodes if n.op == "call_function" and n.target is operator.getitem]
    if not items:
        return ""
    node = draw.choice(items)
    node.args = (node.args[0], 1 - node.args[1])
    return f"{node} of {node.args}"


def _swap_arguments(gm: GraphModule, draw: random.Random) -> str:
    node = draw.choice(_calls(gm))
    places = [at for at, arg in enumerate(node.args) if isinstance(arg, Node)]
    if len(places) < 2:
        return ""
    a, b = draw.sample(places, 2)
    args = list(node.args)
    args[a], args[b] = args[b], args[a]
    node.args = tuple(args)
    return f"arguments {a} and {b} of {node}"


_EDITS: dict[str, Callable[[GraphModule, random.Random], str]] = {
    "insert": _insert,
    "delete": _delete,
    "rewire": _rewire,
    "constant": _constant,
    "duplicate": _duplicate,
    "swap results": _swap,
    "swap arguments": _swap_arguments,
}
