"""The tensors of a block's experts as rules read them: shapes, strides, dtypes, and whether the graph computes them.

An ``Operand`` has the attributes of a tensor that ``limits/calls`` reads, so that a block is judged by the very readers
that its calls are verified with. It is hashable, and equal for equal layers.

``stored`` says that a tensor exists before the graph runs: an input of the graph (a parameter, a buffer, or a tensor that
the caller holds; of a graph inside of another one only where every call gives it such a tensor, see ``subgraphs``), or a
constant of its module, seen through nothing but a swap of its last two axes. A memory format such
as FRACTAL_NZ is a property of those alone. What the graph computes (a cast, a LoRA merge, a gather, ``torch.stack``) is a
new tensor in ND. So is, to be safe, every other view: FRACTAL_NZ keeps the columns of a whole matrix apart in blocks, so
that a slice or a reshaped tensor is no part of it that could be read by itself, and torch_npu turns such views into ND.
Sources: ops_transformer.grouped_matmul_nz; wheel.docs: npu_format_cast, FRACTAL_NZ is [N1, M1, M0, N0].
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.passes.graph.arguments import argument, input_node

aten = torch.ops.aten

ND, NZ = "nd", "nz"
# What ``weight_format`` is beside those two, where the deployment says FRACTAL_NZ and the graph computes (some) weights.
COMPUTED, MIXED = "nd (computed)", "nz and nd (computed)"
COMPUTED_OUTSIDE = "moe_lowering_computed"  # key in the metadata of an input that the outer graph may compute


@dataclasses.dataclass(frozen=True)
class Operand:
    """What rules may read of one tensor. Sizes and strides of weights are ints, since those never vary; of other tensors a
    size may be symbolic, or None where it is not judged. Without strides it is contiguous."""

    shape: tuple[Any, ...]
    dtype: torch.dtype
    strides: tuple[int, ...] = ()
    stored: bool = True
    device: torch.device | None = None

    def stride(self) -> tuple[int, ...]:
        return self.strides or row_major(n if isinstance(n, int) else 1 for n in self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def is_contiguous(self) -> bool:
        if not self.strides or 0 in self.shape:
            return True
        pairs = zip(self.shape, self.stride(), row_major(self.shape), strict=True)
        return all(n == 1 or stride == dense for n, stride, dense in pairs)

    def cast(self, dtype: torch.dtype) -> Operand:
        """As an emitted cast makes it."""
        return self if dtype == self.dtype else Operand(self.shape, dtype, stored=False, device=self.device)


def row_major(shape: Iterable[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    strides, step = [], 1
    for n in reversed(tuple(shape)):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


def _operand(
    shape: tuple[Any, ...], dtype: torch.dtype, strides: tuple[Any, ...], stored: bool, device: Any
) -> Operand:
    return Operand(tuple(map(int, shape)), dtype, tuple(map(int, strides)), stored, device)


@dataclasses.dataclass(frozen=True)
class Operands:
    """A list of tensors: ``count`` of them, all like the only entry of ``kinds``, or one entry each where they differ."""

    count: int = 0
    kinds: tuple[Operand, ...] = ()

    @staticmethod
    def of(tensors: Sequence[tuple[torch.Tensor, bool]]) -> Operands:
        """Of (fake) tensors of static shapes, each with whether it is stored. Most lists are of tensors that are alike."""
        if not tensors:
            return NO_OPERANDS
        facts = [(tuple(t.shape), t.dtype, tuple(t.stride()), stored, t.device) for t, stored in tensors]
        alike = all(fact == facts[0] for fact in facts)
        return Operands(len(facts), tuple(_operand(*fact) for fact in (facts[:1] if alike else facts)))

    def __bool__(self) -> bool:
        return self.count > 0

    @property
    def items(self) -> list[Operand]:
        return list(self.kinds) * self.count if len(self.kinds) == 1 else list(self.kinds)

    @property
    def first(self) -> Operand:
        return self.kinds[0]

    @property
    def stacked(self) -> bool:
        """Whether it is one tensor that holds the matrices of all experts."""
        return self.count == 1 and self.first.dim() == 3

    def repeated(self, experts: int) -> Operands:
        """Of one expert as of ``experts`` like it, in the same form: one tensor [1, ...], or a list of one."""
        if self.count != 1:
            return self
        first = self.first
        if first.dim() < 2 or first.shape[0] != 1:
            return Operands(experts, self.kinds)
        shape = (experts, *first.shape[1:])
        strides = row_major(shape) if first.is_contiguous() else first.strides
        return Operands(1, (dataclasses.replace(first, shape=shape, strides=strides),))

    def cast(self, dtype: torch.dtype) -> Operands:
        return self.cast_each(lambda _: dtype)

    def cast_each(self, dtype: Callable[[torch.dtype], torch.dtype]) -> Operands:
        """Each to what ``dtype`` makes of its own."""
        return Operands(self.count, tuple(kind.cast(dtype(kind.dtype)) for kind in self.kinds))


NO_OPERANDS = Operands()


@dataclasses.dataclass(frozen=True)
class ExpertOperands:
    """The tensors of a block's experts, by the names of ``grouped_mlp``'s arguments."""

    w13: Operands = Operands()
    w2: Operands = Operands()
    w13_bias: Operands = Operands()
    w2_bias: Operands = Operands()
    w13_scale: Operands = Operands()
    w2_scale: Operands = Operands()
    w13_offset: Operands = Operands()
    w2_offset: Operands = Operands()
    w13_scale_bias: Operands = Operands()
    w2_scale_bias: Operands = Operands()

    def of_routed_rank(self, experts: int) -> ExpertOperands:
        """Those of a shared-expert rank as a rank with ``experts`` routed experts holds them: what all ranks judge."""
        return ExpertOperands(**{name: getattr(self, name).repeated(experts) for name in OPERAND_NAMES})


OPERAND_NAMES = tuple(field.name for field in dataclasses.fields(ExpertOperands))


def is_stored(node: Node) -> bool:
    """Whether a node is a tensor that exists before the graph runs, in the memory format that it is stored in."""
    while node.op == "call_function" and _swaps_last_axes(node):
        node = input_node(node)
    return node.op in ("placeholder", "get_attr") and not node.meta.get(COMPUTED_OUTSIDE, False)


def _swaps_last_axes(node: Node) -> bool:
    """Whether a node is its first argument itself, or that with its last two axes swapped."""
    target, args = node.target, node.args
    if not args or not isinstance(args[0], Node) or node.kwargs:
        return False
    if target in _SAME:
        return True
    if target not in _SWAPS:
        return False
    dims = node.meta["val"].dim()
    if target is aten.t.default:
        return dims == 2
    if target is aten.transpose.int:
        return dims >= 2 and {argument(node, name) % dims for name in ("dim0", "dim1")} == {dims - 2, dims - 1}
    order = [axis % dims for axis in argument(node, "dims")]
    return order in ([*range(dims)], [*range(dims - 2), dims - 1, dims - 2])


_SAME = frozenset({aten.alias.default, aten.detach.default})
_SWAPS = frozenset({aten.t.default, aten.transpose.int, aten.permute.default})


@functools.lru_cache(maxsize=256)
def storage_format(declared: str, stored: frozenset[bool]) -> str:
    """The memory format of weights of which ``declared`` is said, and which are stored (True), computed (False) or both."""
    if declared == ND or stored == {True} or not stored:
        return declared
    return MIXED if True in stored else COMPUTED


def call_weight_format(arguments: Mapping[str, Any], declared: str) -> str:
    """The memory format of a call's weights, nodes or records: the quantity ``weight_format``."""
    weights = [arguments.get(name) or () for name in ("weight", "w13", "w2")]
    each = {id(n): n for w in weights for n in (w if isinstance(w, (list, tuple)) else (w,))}.values()
    stored = (n.stored if isinstance(n, Operand) else is_stored(n) for n in each if isinstance(n, (Node, Operand)))
    return storage_format(declared, frozenset(stored))
