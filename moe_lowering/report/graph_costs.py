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

from moe_lowering.limits.calls.schemas import COLLECTIVES, LIBRARIES

# What launches nothing: host-only checks, and memory that nobody has written yet.
_NO_KERNEL = ("wait_tensor", "assert_tokens", "ge_assert_tokens", "assert_agreement", "keep_alive", "ge_keep", "empty")
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
    traffic = read_traffic(node)
    if traffic is None:
        return Cost()
    moved = sum(_size(node, value) for value in (*traffic.all_given, *traffic.written))
    copies = Cost(len(traffic.copied), 0, sum(2 * _size(node, value) for value in traffic.copied))
    return copies + Cost(1, int(traffic.collective), moved, moved if traffic.collective else 0)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The tensors that a kernel reads and writes.

    Attributes:
        name: of the operator, without namespace. collective: it is an exchange between ranks.
        given: what it reads by parameter, but for experts. experts: those. written: results, or what is written in place.
        copied: what is copied first, since it is in pieces.
    """

    name: str
    collective: bool
    given: dict[str, list[torch.Tensor]]
    experts: dict[str, list[torch.Tensor]]
    written: list[torch.Tensor]
    copied: list[torch.Tensor]

    @property
    def all_given(self) -> list[torch.Tensor]:
        return [value for values in self.given.values() for value in values]


def read_traffic(node: Node) -> Traffic | None:
    """Of one node; None where nothing is launched. A target without an overload has ``_schema`` and ``namespace`` of its own."""
    target: Any = node.target
    if node.op != "call_function" or not hasattr(target, "_schema"):
        return None  # items of tuples, arithmetic on sizes
    name = target._schema.name.split("::")[1]
    operands, experts = _read(node, name)
    written = _take_written(target, operands)
    results = written or list(_tensors(node.meta.get("val")))
    if name in _NO_KERNEL or not results:
        return None
    values = [value for part in operands.values() for value in part]
    if not written and _is_view(results, values):
        return None
    collective = target.namespace in COLLECTIVES
    copied = []
    if collective or target.namespace in ("npu", "moe_lowering", *LIBRARIES.values()):
        copied = [value for value in values if not value.is_contiguous()]
    return Traffic(name, collective, operands, experts, results, copied)


def _read(node: Node, name: str) -> tuple[dict[str, list[torch.Tensor]], dict[str, list[torch.Tensor]]]:
    """The values of a call's arguments by parameter: those that are not experts, and those that are."""
    left_out = _EXPERTS | _EXPERTS_OF.get(name, frozenset())
    target: Any = node.target
    parameters = [argument.name for argument in target._schema.arguments]
    named = {**dict(zip(parameters, node.args, strict=False)), **node.kwargs}
    operands: dict[str, list[torch.Tensor]] = {}
    experts: dict[str, list[torch.Tensor]] = {}
    for parameter, value in named.items():
        nodes = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Node))
        tensors = [tensor for leaf in nodes for tensor in _tensors(leaf.meta.get("val"))]
        of = experts if target.namespace != "aten" and parameter in left_out else operands
        if tensors:
            of[parameter] = tensors
    return operands, experts


def _take_written(target: Any, operands: dict[str, list[torch.Tensor]]) -> list[torch.Tensor]:
    """The memory that an operator writes in place. What it writes only (``out``) is taken out of what it reads."""
    written = []
    for argument in target._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name in operands:
            written += (operands.pop if argument.is_out else operands.__getitem__)(argument.name)
    return written


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def _is_view(results: list[torch.Tensor], operands: list[torch.Tensor]) -> bool:
    """Whether an operator makes nothing: its results are memory that it was given. A reshape may be that or a copy."""
    memory = {value.untyped_storage()._cdata for value in operands}
    return all(value.untyped_storage()._cdata in memory for value in results)


def _size(node: Node, value: torch.Tensor) -> int:
    count = value.numel()
    if not isinstance(count, int):
        raise ValueError(
            f"node_cost: {node.name} has a tensor of shape {tuple(value.shape)}; accepted: sizes that are known"
        )
    return count * value.element_size()
