"""Records of the stage that raises: a layer that others wrote, and why something that looks like one was not raised."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import Graph, Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import shape_key
from moe_lowering.report.leftovers import NotRaised
from moe_lowering.source_lines import innermost
from moe_lowering.vocabulary import SWIGLU_ALPHA


@dataclasses.dataclass(frozen=True)
class Weights:
    """Matrices of experts, as a graph has them, and what must be put in for ``grouped_mlp`` to take them.

    Attributes:
        nodes: one tensor [E, K, N], or one [K, N] for each expert; with ``joined`` those of gate, then as many of up.
        transposed: each is [..., N, K]; a view makes it [..., K, N].
        joined: gate and up are concatenated along N, which copies them in every forward.
    """

    nodes: tuple[Node, ...]
    transposed: bool = False
    joined: bool = False


@dataclasses.dataclass(frozen=True)
class Copied:
    """Choices that give a token itself: x [T, H] times the weights of ids from ``first`` to ``last`` - 1."""

    x: Node
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class Constant:
    """Choices that give alpha_1 * x + alpha_2 * v, by line of [C, H], times the weights of ids from ``first`` to ``last`` - 1."""

    x: Node
    alpha_1: Node
    alpha_2: Node
    v: Node
    first: int
    last: int

    @property
    def nodes(self) -> tuple[Node, ...]:
        return (self.x, self.alpha_1, self.alpha_2, self.v)


@dataclasses.dataclass(frozen=True)
class Norm:
    """What follows a combine in the same operator: a residual [T, 1, H] that is added, and the RMS norm by gamma [H] of the sum.

    Attributes:
        results: the operator's results that are read: (index, node).
    """

    residual: Node
    gamma: Node
    epsilon: float
    results: tuple[tuple[int, Node], ...]

    @property
    def first(self) -> Node:
        """The result that stands first in the graph."""
        return min(node for _, node in self.results)


@dataclasses.dataclass(frozen=True)
class ForeignBlock:
    """An MoE layer that is not written with the generic operators, in terms of those.

    Attributes:
        form: the name of the form, a key of ``FORMS``.
        result: the node whose value is the sum of ``combine(...)`` and what is added to it; it is replaced.
        interior: all nodes that are there for the result's sake alone, the result among them; erased with it.
        shared: nodes that it is computed from too and that others read; what nobody reads any more goes with it.
        x: tokens [..., H]. ids, weights: [..., k], of as many tokens; any integers and floats.
        num_experts: E, on all ranks.
        w13_bias, w2_bias, and the lists of quantised weights: as ``grouped_mlp`` takes them; with ``w13.joined`` those of
            ``w13`` are of gate, then of up, where they are as many as its nodes, and of both side by side elsewhere.
        rounded: the dtype that weights are rounded to before they are used; None for their own.
        weigh_input: x is multiplied by the weights instead of the results; k is 1.
        x_smooth, h_smooth: [E, H] and [E_local, I] float32, smooth scales of tokens and activations.
        h_clip: [E_local] float32, at which share of its largest value a row of activations is clipped.
        bases: [T, H] each, added to the result. copied, constant: what copy and const experts add to it.
        partial: [..., H] each, what each rank adds to its own result; their sum over ``partial_group`` is added to the result.
        zero_experts: ids past the experts', for which no row is sent.
        slot_mask: [T, k] bool, False for a slot that gives nothing, whatever its id is; None for none of them.
        counts: rows of each expert as the generic ``dispatch`` gives them, where they are read elsewhere too.
        first, middle: where dispatch and ``grouped_mlp`` stand: what they read exists there; None for in front of the result.
        edges: operations that only wait for a value inside: (who waits, the value). They wait for x or the result then.
        own: the implementation that the layer is written as, "" for none. ``own_operators``: how many of each its experts are.
            Where both are what would be chosen, the layer is left as it is.
        overlaps: something else was put between its first operation and its result, on another stream.
        norm: what the layer's last operator does after combine; ``result`` is the first of its results then. None for nothing.
        notes: what the report says beside what the lowering says.
    """

    form: str
    result: Node
    interior: tuple[Node, ...]
    x: Node
    ids: Node
    weights: Node
    num_experts: int
    w13: Weights
    w2: Weights
    activation: str
    limit: float = 0.0
    alpha: float = SWIGLU_ALPHA
    interleaved: bool = False
    w13_bias: tuple[Node, ...] = ()
    w2_bias: tuple[Node, ...] = ()
    x_scale: Node | None = None
    mask: Node | None = None
    rounded: Any = None
    weigh_input: bool = False
    bases: tuple[Node, ...] = ()
    partial: tuple[Node, ...] = ()
    partial_group: str = ""
    copied: Copied | None = None
    constant: Constant | None = None
    zero_experts: int = 0
    slot_mask: Node | None = None
    quantisation: str = "none"
    w13_scale: tuple[Node, ...] = ()
    w2_scale: tuple[Node, ...] = ()
    w13_offset: tuple[Node, ...] = ()
    w2_offset: tuple[Node, ...] = ()
    w13_scale_bias: tuple[Node, ...] = ()
    w2_scale_bias: tuple[Node, ...] = ()
    out_dtype: Any = None
    x_smooth: Node | None = None
    h_smooth: Node | None = None
    h_clip: Node | None = None
    ep_group: str = ""
    ep_size: int = 1
    tp_group: str = ""
    tp_size: int = 1
    counts: Node | None = None
    first: Node | None = None
    middle: Node | None = None
    edges: tuple[tuple[Node, Node], ...] = ()
    own: str = ""
    own_operators: tuple[tuple[str, int], ...] = ()
    overlaps: bool = False
    norm: Norm | None = None
    shared: tuple[Node, ...] = ()
    notes: tuple[str, ...] = ()

    def reading(self, replaced: Mapping[Node, Node]) -> ForeignBlock:
        """The same where results of other layers that it reads were replaced."""
        if not any(node in replaced for node in self.operands):
            return self

        def now(value: Any) -> Any:
            if isinstance(value, Node):
                return now(replaced[value]) if value in replaced else value
            if isinstance(value, Weights):
                return dataclasses.replace(value, nodes=now(value.nodes))
            if isinstance(value, Copied):
                return dataclasses.replace(value, x=now(value.x))
            if isinstance(value, Constant):
                x, alpha_1, alpha_2, v = map(now, value.nodes)
                return Constant(x, alpha_1, alpha_2, v, value.first, value.last)
            if isinstance(value, Norm):
                return dataclasses.replace(value, residual=now(value.residual), gamma=now(value.gamma))
            return tuple(map(now, value)) if isinstance(value, tuple) else value

        kept = ("result", "interior", "shared", "counts", "first", "middle", "edges", "own_operators")
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in kept}
        return dataclasses.replace(self, **{name: now(value) for name, value in fields.items()})

    @property
    def top_k(self) -> int:
        """Choices of a token."""
        return int(self.ids.meta["val"].shape[-1])

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for layers whose generic operators have equal values: all but the nodes, of which shapes and dtypes."""

        def plain(value: Any) -> Any:
            if isinstance(value, Node):
                return shape_key(value.meta["val"])
            if isinstance(value, Weights):
                return (plain(value.nodes), value.transposed, value.joined)
            if isinstance(value, Copied):
                return (plain(value.x), value.first, value.last)
            if isinstance(value, Constant):
                return (plain(value.nodes), value.first, value.last)
            if isinstance(value, Norm):
                return (plain(value.residual), plain(value.gamma), value.epsilon, tuple(at for at, _ in value.results))
            return tuple(map(plain, value)) if isinstance(value, tuple) else value

        kept = ("interior", "shared", "notes", "first", "middle", "edges")
        return tuple(plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in kept)

    @property
    def operands(self) -> tuple[Node, ...]:
        """Every node that the generic operators will read."""
        single = (
            self.x, self.ids, self.weights, self.x_scale, self.mask, self.slot_mask, self.x_smooth, self.h_smooth, self.h_clip,
            None if self.copied is None else self.copied.x, *(() if self.constant is None else self.constant.nodes),
            *(() if self.norm is None else (self.norm.residual, self.norm.gamma)),
        )  # fmt: skip
        lists: tuple[Sequence[Node], ...] = (
            self.bases,
            self.partial,
            self.w13.nodes,
            self.w2.nodes,
            self.w13_bias,
            self.w2_bias,
            self.w13_scale,
            self.w2_scale,
            self.w13_offset,
            self.w2_offset,
            self.w13_scale_bias,
            self.w2_scale_bias,
        )
        return (*(node for node in single if node is not None), *(node for nodes in lists for node in nodes))


class NotThisForm(Exception):
    """Why an anchor was not raised. Never leaves this package.

    Args:
        node: where in the graph.
        code: ``raise.*``.
        seen, expected: in words.
    """

    def __init__(self, node: Node, code: str, seen: str, expected: str) -> None:
        line = innermost(node.meta.get("stack_trace") or "")
        self.record = NotRaised(node.name, "" if line is None else str(line), code, seen, expected)
        super().__init__(str(self.record))


@dataclasses.dataclass(frozen=True)
class ForeignForm:
    """A way in which others write an MoE layer.

    Attributes:
        name: as reports have it.
        anchors: names of the operators, with the overload, that a layer of this form has, e.g.
            ``aten._grouped_mm.default``.
        groups: takes a graph's anchors, in its order, and puts those of one layer together; what is no layer for sure is
            left out.
        match: reads the graph around the anchors of one layer. Raises ``NotThisForm``.
    """

    name: str
    anchors: tuple[str, ...]
    groups: Callable[[Sequence[Node]], list[list[Node]]]
    match: Callable[[Graph, list[Node], Deployment], ForeignBlock]
