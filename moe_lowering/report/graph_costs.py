"""What the operators of a lowered graph cost on a device: kernels, and bytes that they read, write and exchange.

Counted from the fake values of the nodes, not from a formula, so that another kernel or another pass over a buffer is seen.
One operator is one kernel. Nothing is launched for views, sizes, outputs taken from a tuple, waits and host-only checks. An
operator of torch_npu, or a collective, that gets a tensor in pieces copies it first: one more kernel.

Bytes are those of whole tensors: row buffers count at their bound, since nobody knows how many rows are valid. Expert
weights and what belongs to them are left out: every implementation reads them alike. What an operator moves inside of
itself (rows between ranks in MC2, hidden rows of the fused ones) is not visible in a graph, and not counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

_COLLECTIVES = ("_c10d_functional", "npu_define")
_HOST_ONLY = ("wait_tensor", "assert_tokens", "ge_assert_tokens", "assert_agreement", "keep_alive", "ge_keep")
# Arguments that hold experts: weights, and scales, offsets and biases by expert. ``scale`` is that of grouped matmuls alone.
_EXPERTS = frozenset({
    "weight", "bias", "antiquant_scale", "antiquant_offset", "weight_scale", "weight_assist_matrix",
    *(f"{name}{what}" for name in ("w13", "w2") for what in ("", "_scale", "_offset", "_bias", "_scale_bias")),
})  # fmt: skip
_EXPERTS_OF = {"npu_grouped_matmul": frozenset(("scale", "offset"))}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one operator, or several, cost.

    Attributes:
        kernels: launches on the device, collectives among them.
        collectives: exchanges between ranks that are operators of their own.
        moved: bytes read and written.
        exchanged: those of them that collectives read and write.
    """

    kernels: int = 0
    collectives: int = 0
    moved: int = 0
    exchanged: int = 0

    def __add__(self, other: Cost) -> Cost:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(a + b for a, b in pairs))


def total_cost(nodes: Iterable[Node]) -> Cost:
    """Of all nodes together."""
    return sum((node_cost(node) for node in nodes), Cost())


def node_cost(node: Node) -> Cost:
    """Of one node of a graph whose sizes are known.

    Raises:
        ValueError: a size is symbolic; the message names node and shape.
    """
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return Cost()  # items of tuples, arithmetic on sizes
    name = target._schema.name.split("::")[1]
    results = list(_tensors(node.meta.get("val")))
    if name in _HOST_ONLY or not results:
        return Cost()
    operands = [value for argument in _read(node, name) for value in _tensors(argument)]
    if _is_view(node, results, operands):
        return Cost()
    written = operands[:1] if target._schema.is_mutable else results
    moved = sum(_size(node, value) for value in (*operands, *written))
    collective = target.namespace in _COLLECTIVES
    copied = []
    if collective or target.namespace in ("npu", "moe_lowering"):
        copied = [value for value in operands if not value.is_contiguous()]
    copies = Cost(len(copied), 0, sum(2 * _size(node, value) for value in copied))
    return copies + Cost(1, int(collective), moved, moved if collective else 0)


def _read(node: Node, name: str) -> Iterator[Any]:
    """The values of a call's arguments that are not experts."""
    left_out = _EXPERTS | _EXPERTS_OF.get(name, frozenset())
    parameters = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    named = {**dict(zip(parameters, node.args, strict=False)), **node.kwargs}
    is_aten = node.target.namespace == "aten"  # type: ignore[union-attr]
    for parameter, value in named.items():
        if is_aten or parameter not in left_out:
            yield from (leaf.meta.get("val") for leaf in tree_leaves(value) if isinstance(leaf, Node))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def _is_view(node: Node, results: list[torch.Tensor], operands: list[torch.Tensor]) -> bool:
    """Whether an operator makes nothing: its results are memory that it was given. A reshape may be that or a copy."""
    if node.target._schema.is_mutable:  # type: ignore[union-attr]
        return False
    memory = {value.untyped_storage()._cdata for value in operands}
    return all(value.untyped_storage()._cdata in memory for value in results)


def _size(node: Node, value: torch.Tensor) -> int:
    count = value.numel()
    if not isinstance(count, int):
        raise ValueError(
            f"node_cost: {node.name} has a tensor of shape {tuple(value.shape)}; accepted: sizes that are known"
        )
    return count * value.element_size()
