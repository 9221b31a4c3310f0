"""Random edits of graphs with hand-written chains: each is to be left, or lowered to what computes the same.

An edit inserts an operation on an edge, rewires an argument to another value of the same shape and dtype, changes a literal,
swaps two arguments, returns a value that was inside, or writes in place.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten
EDITS = ("insert", "rewire", "literal", "swap", "read", "write")
_LITERALS: dict[type, Any] = {
    bool: lambda value, draw: not value,
    int: lambda value, draw: draw.choice([0, 1, 2, -1, value + 1]),
    float: lambda value, draw: draw.choice([0.0, 1.0, value + 0.5]),
}


def edit(gm: GraphModule, seed: str) -> tuple[GraphModule, str]:
    """A copy of a graph module with one or two edits, and what they were."""
    draw = random.Random(seed)
    made = copy.deepcopy(gm)
    done = [_EDITS[name](made, draw) for name in draw.choices(EDITS, k=draw.choice((1, 1, 2)))]
    made.graph.lint()
    made.recompile()
    return made, "; ".join(done)


def _value(node: Node) -> Any:
    return node.meta.get("val")


def _computed(gm: GraphModule) -> list[Node]:
    """Nodes that compute numbers; masks take none of the operations that are put in."""
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    return [node for node in calls if isinstance(_value(node), torch.Tensor) and _value(node).dtype != torch.bool]


def _insert(gm: GraphModule, draw: random.Random) -> str:
    node = draw.choice(_computed(gm))
    target, more = draw.choice([
        (aten.neg.default, ()), (aten.relu.default, ()), (aten.abs.default, ()), (aten.mul.Tensor, (2,)),
        (aten.flip.default, ([0],)), (aten.clone.default, ()), (aten.add.Tensor, (1,)), (aten.alias.default, ()),
    ])  # fmt: skip
    with gm.graph.inserting_after(node):
        new = gm.graph.call_function(target, (node, *more))
    new.meta.update(val=target(_value(node), *more), stack_trace="")
    readers = [user for user in node.users if user is not new]
    for user in draw.sample(readers, draw.randint(1, len(readers))) if readers else ():
        user.replace_input_with(node, new)
    return f"{target} on {node.name}"


def _alike(a: Node, b: Node) -> bool:
    x, y = _value(a), _value(b)
    return isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and x.shape == y.shape and x.dtype == y.dtype


def _rewire(gm: GraphModule, draw: random.Random) -> str:
    nodes = [node for node in gm.graph.nodes if node.op != "output"]
    for _ in range(50):
        user = draw.choice([node for node in gm.graph.nodes if node.all_input_nodes])
        old = draw.choice(user.all_input_nodes)
        like = [node for node in nodes if node < user and node is not old and _alike(node, old)]
        if like:
            new = draw.choice(like)
            user.replace_input_with(old, new)
            return f"{user.name} reads {new.name} for {old.name}"
    return "nothing rewired"


def _literal(gm: GraphModule, draw: random.Random) -> str:
    spots = [
        (node, key)
        for node in gm.graph.nodes
        for key, value in (*enumerate(node.args), *node.kwargs.items())
        if node.op == "call_function" and type(value) in _LITERALS
    ]
    node, key = draw.choice(spots)
    args, kwargs = list(node.args), dict(node.kwargs)
    place: Any = args if isinstance(key, int) else kwargs
    place[key] = _LITERALS[type(place[key])](place[key], draw)
    node.args, node.kwargs = tuple(args), kwargs
    return f"{node.name}: {key} is {place[key]}"


def _swap(gm: GraphModule, draw: random.Random) -> str:
    user = draw.choice([node for node in gm.graph.nodes if len(node.all_input_nodes) > 1])
    a, b = draw.sample(user.all_input_nodes, 2)
    user.args, user.kwargs = torch.fx.node.map_arg((user.args, user.kwargs), lambda n: {a: b, b: a}.get(n, n))
    return f"{user.name}: {a.name} and {b.name} swapped"


def _read(gm: GraphModule, draw: random.Random) -> str:
    # What is in those is no matter
    node = draw.choice([each for each in _computed(gm) if "empty" not in str(each.target)])
    (output,) = gm.graph.find_nodes(op="output")
    results = output.args[0]
    output.args = ((*(results if isinstance(results, (tuple, list)) else (results,)), node),)
    return f"{node.name} returned"


def _write(gm: GraphModule, draw: random.Random) -> str:
    node = draw.choice([n for n in gm.graph.nodes if isinstance(_value(n), torch.Tensor)])
    after = draw.choice([n for n in gm.graph.nodes if n.op not in ("output", "placeholder") and not n < node])
    with gm.graph.inserting_after(after):
        new = gm.graph.call_function(aten.zero_.default, (node,))
    new.meta.update(val=_value(node), stack_trace="")
    return f"{node.name} zeroed after {after.name}"


_EDITS = {"insert": _insert, "rewire": _rewire, "literal": _literal, "swap": _swap, "read": _read, "write": _write}
