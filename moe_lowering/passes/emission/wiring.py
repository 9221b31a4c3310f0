"""``Wiring``: what the stages of a block read, with a key that is equal for blocks which records and emitters cannot tell apart.

Of the graph, records and emitters read the arguments of a block's stages, the values of nodes, and the order of nodes. So
the key has
- every argument of every stage as it stands, nodes by number: the same node in two places has one number;
- of each of these nodes the value's shape, strides, dtype and device, and before which stage it stands;
- of the experts' tensors whether they are stored.
What stages give each other is left out: matching has proven it, and a rewrite leaves nothing of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from moe_lowering.passes.blocks import size_key
from moe_lowering.passes.operands import is_stored

Nodes = Sequence[Node]


@dataclasses.dataclass(frozen=True)
class Wiring:
    """What a block's stages read: ``inputs``, each node once in the order of arguments, and ``key``, the same for blocks of one
    record that an emitter cannot tell apart."""

    inputs: tuple[Node, ...]
    key: tuple[Any, ...]


def read_wiring(stages: Nodes, inside: Collection[Node], experts: Node | None = None) -> Wiring:
    """Of the stages of a block, in graph order.

    Args:
        inside: the stages and their results. Later stages read those, and a rewrite erases them.
        experts: the stage that reads the experts' tensors.
    """
    numbers: dict[Node, int] = {}
    arguments = [(_number(stage._args, numbers), _number_named(stage._kwargs, numbers)) for stage in stages]
    first, count = stages[0], len(stages)
    described = [
        None
        if node in inside
        else (_describe(node.meta.get("val")), count if node < first else _stages_after(node, stages))
        for node in numbers
    ]
    tensors = () if experts is None else experts._input_nodes
    return Wiring(tuple(numbers), (*arguments, *described, *map(is_stored, tensors)))


def _stages_after(node: Node, stages: Nodes) -> int:
    """How many of the stages stand after a node."""
    return [node < stage for stage in stages].count(True)


_PLAIN = frozenset({int, bool, str, type(None), torch.dtype, torch.device})


def _number(values: Sequence[Any], numbers: dict[Node, int]) -> tuple[Any, ...]:
    """Arguments with a number in place of each node. With types and signs of zero, as 1 == True and 0.0 == -0.0."""
    numbered: list[Any] = []
    for value in values:
        kind = type(value)
        if kind in _PLAIN:
            numbered.append(value)
        elif kind is Node:
            numbered.append(numbers.setdefault(value, len(numbers)))
        elif isinstance(value, (tuple, list)):
            numbered.append(_number(value, numbers))
        elif isinstance(value, Mapping):
            numbered.append(_number_named(value, numbers))
        else:
            numbered.append((value, math.copysign(1.0, value)) if kind is float else value)
    return (*map(type, values), *numbered)


def _number_named(values: Mapping[str, Any], numbers: dict[Node, int]) -> tuple[Any, ...]:
    return (*values, *_number([*values.values()], numbers)) if values else ()


def _describe(value: Any) -> Any:
    """What an emitter may read of a value."""
    if isinstance(value, torch.Tensor):
        sizes = (*value.shape, *value.stride())
        if value._has_symbolic_sizes_strides:
            sizes = (*[size if type(size) is int else size_key(size) for size in sizes],)
        return (sizes, value.dtype, value.fake_device if type(value) is FakeTensor else value.device)
    return tuple(map(_describe, value)) if isinstance(value, (tuple, list)) else type(value)
