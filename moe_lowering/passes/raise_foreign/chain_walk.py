"""How matchers of torch_npu chains walk: from a value to what reads it, and what the operators' arguments must be.

Contract. Reads the graph, never edits it. What is not proven ends the walk: ``NotThisForm`` with a stable code, the node, what
was seen and what is accepted. Defaults of the schema are filled in before an argument is looked at.

Three kinds of readers are no use of a value. What is made in its sizes (``empty_like``) reads no element.
``air.wait_tensor(other, ours)`` orders ``other`` after ours and passes ``other`` on: an edge (``Walk.edges``), which whoever
replaces the value must hang on something else. ``wait_tensor(ours, other)``, a view to the same shape and an alias are the value
itself, and are walked through.
Source: wheel.torchair_scope: npu_wait_tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.passes.blocks import equal_sizes
from moe_lowering.passes.graph.arguments import argument, input_node
from moe_lowering.passes.leftovers.foreign_operators import library_and_name
from moe_lowering.passes.raise_foreign.read_meanings import is_made_alike
from moe_lowering.passes.raise_foreign.records import NotThisForm

aten = torch.ops.aten


class Walk:
    """The nodes of a chain as a matcher goes through it.

    Attributes:
        interior: every node that belongs to the chain.
        edges: nodes that only wait for a value of the chain: (who waits, the value).
        alike: nodes that are made in the sizes of a value of the chain, and read nothing else of it.
    """

    def __init__(self) -> None:
        self.interior: dict[Node, None] = {}
        self.edges: list[tuple[Node, Node]] = []
        self.alike: list[Node] = []

    def add(self, *nodes: Node) -> None:
        self.interior.update(dict.fromkeys(nodes))

    def results(self, node: Node, count: int) -> list[Node | None]:
        """The ``getitem`` users of an operator with several results, by index; None for one that nobody reads."""
        outputs: list[Node | None] = [None] * count
        for user in node.users:
            index = user.args[1] if user.target is operator.getitem else None
            if type(index) is not int or not -count <= index < count or outputs[index] is not None:
                raise NotThisForm(
                    node,
                    "raise.operation_between",
                    f"{node.name}'s results are read by {user.name}, not one by one",
                    "the results one by one",
                )
            outputs[index] = user
        self.add(node, *(each for each in outputs if each is not None))
        return outputs

    def readers(self, node: Node) -> list[Node]:
        """Who reads a value; those that only wait for it are noted as edges."""
        readers = []
        for user in node.users:
            if is_wait(user) and user.args[1] is node and user.args[0] is not node:
                if (user, node) not in self.edges:
                    self.edges.append((user, node))
            elif is_made_alike(user):
                if user not in self.alike:
                    self.alike.append(user)
            else:
                readers.append(user)
        return readers

    def close(self) -> None:
        """What is made in the sizes of a value of the chain goes with it.

        Raises:
            NotThisForm: it is read by more than the chain.
        """
        for node in self.alike:
            self.read_by(node, "a tensor as large as a value of the chain", *self.interior)
            self.add(node)

    def onward(self, node: Node, what: str) -> tuple[Node, Node]:
        """The one reader of a value, and the node that it reads: the value itself, or one of the same after it."""
        while True:
            readers = self.readers(node)
            if not readers:
                raise NotThisForm(
                    node, "raise.unused", f"{what}, {node.name}, is not read", "a value that the form reads"
                )
            if len(readers) > 1:
                names = ", ".join(user.name for user in readers)
                raise NotThisForm(node, "raise.single_use", f"{what}, {node.name}, is read by {names}", "one reader")
            path = same_value_after(node, readers[0])
            if not path:
                return readers[0], node
            self.add(*path)
            node = path[-1]

    def ways(self, node: Node, what: str) -> list[tuple[Node, Node]]:
        """Each reader of a value, and the node that it reads: the value itself, or one of the same after it."""
        ways, pending = [], [node]
        while pending:
            at = pending.pop(0)
            for reader in self.readers(at):
                path = same_value_after(at, reader)
                if path:
                    self.add(*path)
                    pending.append(path[-1])
                else:
                    ways.append((reader, at))
        if not ways:
            raise NotThisForm(node, "raise.unused", f"{what}, {node.name}, is not read", "a value that the form reads")
        return ways

    def read_by(self, node: Node | None, what: str, *readers: Node) -> None:
        """A value of the chain is read by these only, itself or behind views to the same shape."""
        if node is None:
            return
        for user in self.readers(node):
            path = same_value_after(node, user) if user not in readers else ()
            if path:
                self.add(*path)
                self.read_by(path[-1], what, *readers)
            elif user not in readers:
                names = ", ".join(reader.name for reader in readers)
                raise NotThisForm(node, "raise.single_use", f"{what}, {node.name}, is read by {user.name}", names)


def is_operator(node: Any, *names: str, namespace: str = "npu") -> bool:
    """Whether a node calls one of these operators, of torch_npu or another library, of any overload with the same arguments."""
    target = getattr(node, "target", None)
    return isinstance(target, torch._ops.OpOverload) and target.namespace == namespace and target._opname in names


def other_operator(node: Node, seen: str, expected: str) -> NotThisForm:
    """Why a chain ends at an operator that the form does not have there, by what kind of operator it is."""
    namespace, name = library_and_name(node.target)
    code = "raise.operation_between"
    if namespace == "custom" and name in _CUSTOM:
        code, reason = _CUSTOM[name]
        expected = f"{expected}; {reason}"
    elif namespace == "npu" and name in _NOT_READ:
        code, reason = _NOT_READ[name]
        expected = f"{expected}; {reason}"
    elif namespace == "custom":
        code, expected = "raise.custom", f"{expected}; what custom::{name} computes is not known"
    elif any(word in name for word in _OTHER_FORMATS):
        code, expected = "raise.format", f"{expected}, in 16 bits, int8 or int4"
    return NotThisForm(node, code, seen, expected)


# Operators of custom:: that are known by name, and why a chain that has one at this place is not raised.
# Source: recipes.swiglu_clamp_quant, recipes.swiglu_clip_quant: what they compute
_CUSTOM = {
    "npu_swiglu_clip_quant": (
        "raise.clip",
        "custom::npu_swiglu_clip_quant is known as what makes int8 rows of one scaled matmul of gate and up",
    ),
    "npu_dequant_swiglu_clamp_quant": (
        "raise.clamp_quant",
        "custom::npu_dequant_swiglu_clamp_quant is documented to clamp its halves with swiglu_mode 1, and measured not to; "
        "npu_dequant_swiglu_quant with swiglu_mode 2 does",
    ),
}

# Operators of torch_npu that are known by name, and why a chain with one of them is not raised.
# Source: wheel.docs: npu_grouped_matmul_finalize_routing
_NOT_READ = {
    "npu_grouped_matmul_finalize_routing": (
        "raise.matmul_finalize",
        "npu_grouped_matmul_finalize_routing adds up rows by indices and weights of rows, which the graph computes from those of "
        "slots: write npu_grouped_matmul and npu_moe_finalize_routing",
    ),
}

# Words of operators that quantise to MX or FP8 formats, which no generic operator has
_OTHER_FORMATS = ("mx_quant", "block_quant", "fp8", "mxfp", "hifloat")


def is_wait(node: Node) -> bool:
    """Whether a node is GE's ``wait_tensor(value, dependency)``."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "air" and target._opname == "wait_tensor"


def is_same(node: Node) -> bool:
    """Whether a node is its first argument itself: a view to the same shape, a cast to the same dtype, a wait."""
    if is_wait(node) or node.target in _ALIASES:
        return True
    if node.target not in _VIEWS or not node.args or not isinstance(node.args[0], Node):
        return False
    new, old = node.meta.get("val"), node.args[0].meta.get("val")
    if not isinstance(new, torch.Tensor) or not isinstance(old, torch.Tensor):
        return False
    return new.dtype == old.dtype and same_sizes(new, old)


_ALIASES = frozenset({aten.alias.default, aten.detach.default})
_VIEWS = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten._to_copy.default,
})  # fmt: skip


_RESHAPES = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.squeeze.default,
})  # fmt: skip
_THROUGH = _ALIASES | _VIEWS | _RESHAPES
_FEW = 4  # views one behind the other


def same_value_after(node: Node, reader: Node) -> tuple[Node, ...]:
    """The reader, where it is the value itself; or views, each read by the next alone, of which the last has its shape again."""
    if is_same(reader) and reader.args[0] is node:
        return (reader,)
    path = [reader]
    while len(path) <= _FEW and path[-1].target in _RESHAPES:
        if same_sizes(value_of(path[-1]), value_of(node)):
            return tuple(path)
        if len(path[-1].users) != 1:
            return ()
        path.append(next(iter(path[-1].users)))
    return ()


def same_value_before(node: Node) -> Node:
    """The value that a node is, behind views to the same shape, or views of which the last has that shape again."""
    while node.op == "call_function":
        before = input_node(node) if is_same(node) else _before_views(node)
        if before is None:
            return node
        node = before
    return node


def _before_views(node: Node) -> Node | None:
    at: Any = node
    for _ in range(_FEW):
        if not isinstance(at, Node) or at.target not in _RESHAPES:
            return None
        at = at.args[0]
        if isinstance(at.meta.get("val"), torch.Tensor) and same_sizes(value_of(at), value_of(node)):
            return at
    return None


def written_twice(nodes: Iterable[Node]) -> tuple[list[Node], list[Node]]:
    """Of what a chain reads: (casts and views of one value that stand beside each other or beside it, these values).

    ``equal_values`` takes them to be equal, which they are where nothing was written in between.
    """
    read: dict[Node, list[list[Node]]] = {}
    for node in dict.fromkeys(nodes):
        path = [node]
        while path[-1].target in _THROUGH and path[-1].args and isinstance(path[-1].args[0], Node):
            path.append(path[-1].args[0])
        read.setdefault(path[-1], []).append(path)
    several = {source: paths for source, paths in read.items() if len(paths) > 1}
    return [node for paths in several.values() for path in paths for node in path[:-1]], [*several]


def equal_values(a: Any, b: Any) -> bool:
    """Whether two arguments are the same value: one node, or the same cast and views of one, written twice."""
    if not isinstance(a, Node) or not isinstance(b, Node):
        return bool(type(a) is type(b) and a == b)
    a, b = same_value_before(a), same_value_before(b)
    if a is b:
        return True
    if a.target is not b.target or a.target not in _VIEWS or len(a.args) != len(b.args) or a.kwargs != b.kwargs:
        return False
    return a.args[1:] == b.args[1:] and equal_values(a.args[0], b.args[0])


def same_sizes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two values have the same sizes, for all values of the symbols; no guard is made."""
    return equal_sizes(a.shape, b.shape)


def value_of(node: Node) -> torch.Tensor:
    """The fake value of a node."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise NotThisForm(
            node, "raise.no_value", f"{node.name} has no fake value (meta['val'])", "a node of torch.compile's"
        )
    return value


def require(node: Node, accepted: Mapping[str, Collection[Any]], code: str = "raise.literal") -> None:
    """Each argument that is named is one of the accepted values; None also stands for an empty list."""
    for name, values in accepted.items():
        value = argument(node, name)
        if value == [] or value == ():
            value = None
        if not any(type(value) is type(each) and value == each for each in values):
            shown = " or ".join(map(repr, values))
            raise NotThisForm(node, code, f"{node.name}: {name} is {value!r}", shown)


def require_of(node: Node, accepted: Mapping[str, Collection[Any]], code: str = "raise.literal") -> None:
    """As ``require``, of those arguments that this version of the operator has."""
    require(node, {name: values for name, values in accepted.items() if has_argument(node, name)}, code)


def has_argument(node: Node, name: str) -> bool:
    """Whether the operator has an argument of that name."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return any(each.name == name for each in node.target._schema.arguments)


def require_value(node: Node, name: str, expected: Node | None, code: str = "raise.other_value") -> None:
    """An argument is that value."""
    value = argument(node, name)
    if not equal_values(value, expected):
        raise NotThisForm(node, code, f"{node.name}: {name} is {value!r}", f"{expected!r}")


def tensors(node: Node, name: str) -> list[Node]:
    """A list of tensors that an operator was given; [] for none."""
    value = argument(node, name)
    return list(value) if isinstance(value, (list, tuple)) else []
