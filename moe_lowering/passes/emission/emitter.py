"""``Emitter``: makes the nodes of one block's replacement, with complete metadata and at little cost.

Every new node gets ``meta["val"]`` (a fresh FakeTensor of its own: passes after ours tell aliases by storage, so a value
is never shared between nodes), ``stack_trace`` and ``nn_module_stack`` of the node that it stands for. Running a stock
operator's meta costs 0.2 to 1.3 ms, so for the second and later of equal blocks the values of the first are copied
(``Recording``); views alias the storage of their new base.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, disable_fake_tensor_cache
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils._mode_utils import no_dispatch

from moe_lowering.limits.calls.schemas import LIBRARIES
from moe_lowering.passes.emission.fake_values import Template
from moe_lowering.passes.emission.known_results import known_result
from moe_lowering.passes.emission.new_nodes import MakeBefore, insert_call
from moe_lowering.passes.operands import row_major

aten = torch.ops.aten
COPIED_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "original_aten", "from_node", "seq_nr")

# Nodes of the pass carry it in ``meta["custom"]``, which torch.export keeps when a program is saved.
MARK = "moe_lowering"

# The nodes that hold what is equal in all blocks of a graph, by operator and arguments (``Emitter.constant``).
Constants = dict[Any, Node]

# For each node of one block's replacement, in emission order: its operator, and what gives its value in an equal block,
# from the arguments there.
Arguments = tuple[Any, ...]
Recording = list[tuple[Any, Callable[[Arguments], Any]]]


class Step(Protocol):
    """A node that was emitted for one block, to be made for an equal one from what a tape holds (``Tape.play``)."""

    @property
    def insert(self) -> MakeBefore:
        """Makes it in front of a node, from its arguments."""

    @property
    def fill(self) -> Callable[[Sequence[Any]], Arguments]:
        """Gives its arguments by position."""

    @property
    def fill_named(self) -> Callable[[Sequence[Any]], dict[str, Any]] | None:
        """Gives its arguments by name; None where there is no node in them, so that they are ``kwargs``."""

    @property
    def kwargs(self) -> dict[str, Any]: ...

    @property
    def value(self) -> Callable[[Arguments], Any]:
        """Gives its value, from its arguments by position."""


class Emitter:
    """Emits the nodes of one block's replacement.

    Args:
        graph: the graph to edit.
        fake_mode: the mode of the graph's values.
        recorded: the recording of an equal block; None computes the values.
        constants: those of the graph so far, to which new ones are added; None for a dictionary of its own.

    Attributes:
        recording: for the next of equal blocks.
        created: the nodes emitted so far for the block.
        made: these and the constants that were new.
        places: for each of ``created``, what it was inserted before, and whose source it has.
    """

    def __init__(
        self,
        graph: Graph,
        fake_mode: FakeTensorMode,
        recorded: Recording | None = None,
        constants: Constants | None = None,
    ) -> None:
        self._graph = graph
        self._insert = insert_call(graph)
        self._constants: Constants = {} if constants is None else constants
        self._fake_mode = fake_mode
        self._recorded: Recording = recorded or []
        self._origin_meta: dict[str, Any] = {}
        self._place: Any = None
        self.recording: Recording = [*self._recorded]
        self.created: list[Node] = []
        self.made: list[Node] = []
        self.places: list[tuple[Node, Node]] = []

    @contextmanager
    def at(self, position: Node, origin: Node) -> Iterator[None]:
        """Insert before ``position``; new nodes take the source metadata of ``origin``."""
        previous = self._origin_meta, self._place
        self._place = (position, origin)
        self._origin_meta = _source_meta(origin)
        with self._graph.inserting_before(position):
            yield
        self._origin_meta, self._place = previous

    def target(self, operator: str) -> Any:
        """The overload of an operator's name: of torch_npu, or of ours."""
        return find_overload(operator)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A call_function node with its value."""
        node = self._node(target, args, kwargs)
        node.meta["val"] = self._value(node, target, args)
        return node

    def repeat(self, steps: Sequence[Step], held: list[Any], position: Node, origin: Node) -> None:
        """The nodes of an equal block once more, ``at`` this place. Each is added to ``held``, from which later steps take
        their arguments."""
        source, before = _source_meta(origin), len(held)
        for step in steps:
            kwargs = step.kwargs if step.fill_named is None else step.fill_named(held)
            held.append(step.insert(position, step.fill(held), kwargs))
        made = held[before:]
        guard = torch._C._DisableTorchDispatch()  # for all of their values; above, hooks of the user's may run
        try:
            for node, step in zip(made, steps, strict=True):
                node.meta.update(source, custom={MARK: "emitted"}, val=step.value(node._args))
        finally:
            del guard
        self.created += made
        self.made += made
        self.places += [(position, origin)] * len(made)

    def _node(self, target: Any, args: Arguments, kwargs: dict[str, Any]) -> Node:
        node = self._insert(self._graph, target, args, kwargs)
        meta = node.meta
        meta.update(self._origin_meta)
        meta["custom"] = {MARK: "emitted"}
        self.created.append(node)
        self.made.append(node)
        self.places.append(self._place)
        return node

    def constant(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A call that depends on no input, once per graph: every block that asks for the same gets the same node.

        It stands before all that the graph computes, so outside of every scope. Arguments are plain values, devices,
        dtypes, lists of them, and constants.
        """
        key = (target, *map(_hashable, args), *((name, _hashable(value)) for name, value in kwargs.items()))
        node = self._constants.get(key)
        if node is None or node._erased:  # the node was erased with a rewrite that was undone
            with self._graph.inserting_before(self._first_computed()):
                node = self._graph.call_function(target, args, kwargs)
            node.meta.update(val=self._compute(node), custom={MARK: "constant"})
            self._constants[key] = node
            self.made.append(node)
        return node

    def _first_computed(self) -> Node:
        """The first node that is neither an input nor a constant."""
        node = next(iter(self._graph.nodes))
        while node.op in ("placeholder", "get_attr") or node.meta.get("custom") == {MARK: "constant"}:
            node = node.next
        return node

    def item(self, node: Node, index: int) -> Node:
        """Output ``index`` of an operator with several."""
        return self.call(operator.getitem, node, index)

    def size(self, node: Node, dim: int) -> Any:
        """A size: the int when it is static, else a ``sym_size`` node."""
        size = node.meta["val"].shape[dim]
        return size if isinstance(size, int) else self.call(aten.sym_size.int, node, dim)

    def size_and_maker(self, node: Node, dim: int) -> tuple[Any, Callable[..., Node]]:
        """A size, and what makes nodes of it and of nothing else: ``constant`` where it is static or an input of the graph
        has it, so that they are made once per graph; else ``call``."""
        size = node.meta["val"].shape[dim]
        if isinstance(size, int):
            return size, self.constant
        early = self._find_early(size)
        return (self.size(node, dim), self.call) if early is None else (early, self.constant)

    def _find_early(self, size: torch.SymInt) -> Node | None:
        """The node of a size that stands before all that the graph computes, made from an input's shape if need be."""
        expression, computed = size.node.expr, self._first_computed()
        inputs = [node for node in self._graph.find_nodes(op="placeholder") if node < computed]
        for node in (*inputs, *self._constants.values()):
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and value.node.expr == expression and not node._erased:
                return node
        for node in inputs:
            value = node.meta.get("val")
            for dim, each in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                if isinstance(each, torch.SymInt) and each.node.expr == expression:
                    return self.constant(aten.sym_size.int, node, dim)
        return None

    def rows(self, node: Node) -> Node:
        """The tensor with its leading dimensions merged into one."""
        value = node.meta["val"]
        return node if value.dim() == 2 else self.call(aten.reshape.default, node, [-1, int(value.shape[-1])])

    def in_one_piece(self, node: Node) -> Node:
        """The tensor itself where its elements are known to follow each other in memory, else a copy where they do.

        HCCL takes no other: torch_npu refuses them at run time.
        """
        value = node.meta["val"]
        inner, strides = value.shape[1:], value.stride()
        if all(type(n) is int for n in (*inner, *strides)) and tuple(strides) == row_major((1, *inner)):
            return node
        return self.call(aten.clone.default, node, memory_format=torch.contiguous_format)

    def like(self, node: Node, model: Node) -> Node:
        """A [T, n] tensor with the leading dimensions of ``model``."""
        dims = model.meta["val"].dim()
        if dims == 2:
            return node
        leading = [self.size(model, d) for d in range(dims - 1)]
        return self.call(aten.reshape.default, node, [*leading, int(node.meta["val"].shape[-1])])

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        """The tensor in another dtype; the node itself when it already has it."""
        return node if node.meta["val"].dtype == dtype else self.call(aten._to_copy.default, node, dtype=dtype)

    def _value(self, node: Node, target: Any, args: tuple[Any, ...]) -> Any:
        index = len(self.created) - 1
        if index < len(self._recorded):
            recorded, make = self._recorded[index]
            if recorded is target:
                with no_dispatch():
                    return make(args)
            # A guard of the first block turned a size into a number, so that values of the two blocks no longer correspond.
            self._recorded, self.recording = [], self.recording[:index]
        value = self._compute(node)
        self.recording.append((target, _record_value(node, value)))
        return value

    def _compute(self, node: Node) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        target: Any = node.target
        known = known_result(target, args, kwargs, self._fake_mode)
        if known is not None:
            return known
        with self._fake_mode, _cache_for(args, self._fake_mode):
            value = target(*args, **kwargs)
        # Written in place: the same memory, a value of its own
        if args and value is args[0] and isinstance(value, FakeTensor):
            return Template.of(value).view(value)
        return value


def _source_meta(origin: Node) -> dict[str, Any]:
    """What a new node has of the one that it stands for."""
    meta = origin.meta
    return {key: meta[key] for key in COPIED_META if key in meta}


def _cache_for(args: Arguments, fake_mode: FakeTensorMode) -> AbstractContextManager[None]:
    """Without the cache of fake results for symbolic sizes: an entry is made by making the result once more, for a fifth of what
    a first symbolic block takes, and is not asked for, since an equal block is played from its recording."""
    is_symbolic = any(isinstance(arg, FakeTensor) and arg._has_symbolic_sizes_strides for arg in args)
    return disable_fake_tensor_cache(fake_mode) if is_symbolic else nullcontext()


@functools.cache
def find_overload(operator: str) -> Any:
    """The overload of an operator's name without namespace: of a model's library, of torch_npu, or of ours."""
    own = "npu" if hasattr(torch.ops.npu, operator) else "moe_lowering"
    return getattr(getattr(torch.ops, LIBRARIES.get(operator, own)), operator).default


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    return repr(value) if isinstance(value, float) else value  # NaN is not equal to itself, and 0.0 is to -0.0


def is_emitted(node: Node) -> bool:
    """Whether the pass made this node, in this run or in one before."""
    return MARK in (node.meta.get("custom") or ())


def _record_value(node: Node, value: Any) -> Callable[[Arguments], Any]:
    """What gives the value of the same node of an equal block."""
    if node.target is operator.getitem:
        return lambda args: args[0].meta["val"][args[1]]
    base = node.args[0].meta["val"] if node.args and isinstance(node.args[0], Node) else None
    return _maker(value, base if isinstance(base, FakeTensor) else None)


def _maker(value: Any, base: FakeTensor | None) -> Callable[[Arguments], Any]:
    """Makes a value with the metadata of ``value`` from the arguments: views of the first alias it, all else is fresh."""
    if isinstance(value, FakeTensor):
        template = Template.of(value)
        if base is not None and value.untyped_storage()._cdata == base.untyped_storage()._cdata:
            view = template.viewer(base)
            return lambda args: view(args[0].meta["val"])
        return template.copier()
    if isinstance(value, (list, tuple)):
        kind, makers = type(value), [_maker(v, base) for v in value]
        return lambda args: kind([make(args) for make in makers])
    return lambda args: value  # sizes and None
