"""Records of the MoE layers in a graph: ``Block`` and ``Route`` hold nodes, ``BlockSpec`` and ``RouteSpec`` what decisions read.

``find_blocks`` makes the first two, ``block_specs`` and ``find_blocks`` the others. A spec holds no node and is hashable, so that
equal layers have equal specs and are judged once. A ``Block`` reads its inputs from the nodes whenever it is asked, since the
rewrite of one block replaces the node that the next one reads.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from moe_lowering.custom_ops.grouped_mlp import GroupedMlpCall
from moe_lowering.custom_ops.route import EPSILON
from moe_lowering.lookup import look_up
from moe_lowering.passes.graph.arguments import argument, read
from moe_lowering.passes.operands import ExpertOperands
from moe_lowering.vocabulary import ACTIVATIONS, EXPERT_FORMATS, ExpertFormat

if TYPE_CHECKING:
    from moe_lowering.passes.emission.wiring import Wiring


def size_key(size: Any) -> Any:
    """A hashable form of a size: the int itself, or the sympy expression of a SymInt, whose value may be known by now."""
    if not isinstance(size, torch.SymInt):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_Integer else expression


def equal_sizes(a: Iterable[Any], b: Iterable[Any]) -> bool:
    """Whether sizes are equal one by one, for all values of their symbols; no guard is made."""
    return [*map(size_key, a)] == [*map(size_key, b)]


def shape_key(value: torch.Tensor) -> tuple[Any, ...]:
    """A hashable form of shape, strides, dtype and device of a (fake) tensor."""
    sizes = tuple(size_key(s) for s in value.shape)
    return (sizes, tuple(size_key(s) for s in value.stride()), value.dtype, value.device)


@dataclasses.dataclass(frozen=True)
class RouteSpec:
    """What a ``route`` call computes. ``rows`` is the number of tokens (int or SymInt); equality ignores it, ``key`` does not."""

    rows: Any = dataclasses.field(compare=False)
    experts: int
    top_k: int
    scoring: str
    renormalize: bool
    num_groups: int
    topk_groups: int
    group_score: str
    scale: float
    has_bias: bool
    key: tuple[Any, ...]
    epsilon: float = EPSILON


@dataclasses.dataclass(frozen=True)
class Source:
    """A tensor that a router reads, as an argument of one of its nodes: what stands there is asked when it is needed."""

    reader: Node
    index: int

    @property
    def node(self) -> Node:
        operand = self.reader.args[self.index]
        assert isinstance(operand, Node)
        return operand


@dataclasses.dataclass(frozen=True)
class RaisedRouter:
    """What belongs to a routing that was found in a model's own operators.

    Attributes:
        logits, bias: what it reads.
        interior: its nodes, which are erased where nobody reads them any more.
        end: the node that the result of the block is known by whose router it is.
        notes: what is equal within rounding only.
    """

    logits: Source
    bias: Source | None
    interior: tuple[Node, ...]
    end: Node
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Route:
    """A routing with its results: a ``route`` node, or (``raised``) what a model wrote and computes the same.

    Attributes:
        node: the call of ``route``; of a raised one the node that chooses, where its replacement stands.
        weights, ids: the nodes that a rewrite replaces; None of a result that nobody reads.
        raised: what belongs to a raised one.
    """

    node: Node
    weights: Node | None
    ids: Node | None
    spec: RouteSpec
    raised: RaisedRouter | None = None

    @property
    def logits(self) -> Node:
        return argument(self.node, "logits") if self.raised is None else self.raised.logits.node

    @property
    def bias(self) -> Node | None:
        if self.raised is None:
            return argument(self.node, "bias")
        return None if self.raised.bias is None else self.raised.bias.node


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """All that a decision about a block may depend on; equal for equal layers of a model.

    ``tokens`` is T, the number of tokens of one rank (int or SymInt). It takes no part in equality; ``key`` does, which
    holds shapes, strides and dtypes of the inputs with symbolic sizes as sympy expressions. ``dtype`` is that of the
    result, and of x unless x arrives quantised (``quantised_input``: int8 with a scale per token). ``quantisation`` is
    that of the expert weights, ``none``, ``w8a8``, ``w4a8`` or ``w4a16``; ``scale_dtypes`` are those of w13's and w2's
    scales, ``scale_dims`` their number of dimensions (a list of tensors counts as the stacked one). ``mixed_forms`` says
    that one of w13 and w2 is one tensor and the other a list. With shared-expert ranks ``experts`` and ``local_experts``
    are those of a rank with routed experts, on every rank; ``on_shared_rank`` is a rank's own and no rule reads it.
    ``tensors`` are the experts' own: what rules read of each, and whether the graph computes it. ``has_x_smooth`` and
    ``has_h_smooth``: tokens and activations are multiplied by smooth scales before they become int8. ``has_h_clip``: activations
    are clipped. ``zero_experts``: ids past the experts', of those that give nothing. ``routing_dtype`` is that of the
    routing weights.
    """

    tokens: Any = dataclasses.field(compare=False)
    hidden: int
    intermediate: int
    top_k: int
    experts: int
    local_experts: int
    ep_size: int
    ep_group: str
    tp_size: int
    tp_group: str
    max_tokens: int
    max_rows: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    activation: str
    limit: float
    alpha: float
    interleaved: bool
    stacked: bool
    weights_contiguous: bool
    has_bias: bool
    has_mask: bool
    quantised_input: bool
    counts_are_read: bool
    scopes_differ: bool
    key: tuple[Any, ...]
    quantisation: str = "none"
    scale_dtypes: tuple[torch.dtype, ...] = ()
    scale_dims: int = 0
    has_offset: bool = False
    has_scale_bias: bool = False
    mixed_forms: bool = False
    counts_read_before_combine: bool = False
    counts_read_before_weights: bool = False
    collective_groups: frozenset[str] = frozenset()
    shared_expert_ranks: int = 0
    shared_experts: int = 1
    on_shared_rank: bool = False
    tensors: ExpertOperands = dataclasses.field(default_factory=ExpertOperands)
    has_x_smooth: bool = False
    has_h_smooth: bool = False
    has_h_clip: bool = False
    zero_experts: int = 0
    routing_dtype: torch.dtype = torch.float32

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """Asked for ten times per block, over 40 fields."""
        return hash(_COMPARED(self))

    @functools.cached_property
    def without_tokens(self) -> BlockSpec:
        """The record without T: the same for blocks that differ in nothing else."""
        return dataclasses.replace(self, tokens=None, key=())

    @property
    def format(self) -> ExpertFormat:
        """What belongs to ``quantisation``."""
        return look_up(EXPERT_FORMATS, self.quantisation, "block: quantisation")

    @property
    def smooth_scales(self) -> str:
        """Of what there are smooth scales, in words: ``none`` or which."""
        named = (("tokens", self.has_x_smooth), ("activations", self.has_h_smooth))
        return " and ".join(name for name, there in named if there) or "none"

    @property
    def first_width(self) -> int:
        """Columns of the first matmul's result."""
        return look_up(ACTIVATIONS, self.activation, "block: activation").parts * self.intermediate


_COMPARED = operator.attrgetter(*(field.name for field in dataclasses.fields(BlockSpec) if field.compare))


@dataclasses.dataclass(frozen=True)
class Block:
    """One MoE block: dispatch, grouped MLP and combine.

    Inputs are read from the nodes when they are asked for: rewriting one block replaces the node that the next one reads.

    Attributes:
        counts: the counts' node when something outside of the block reads it.
        interior: every node that a rewrite erases.
        route: the routing that makes the ids, when it is a generic one.
        wiring: what its stages read, when it was found.
    """

    name: str
    dispatch: Node
    mlp: Node
    combine: Node
    counts: Node | None
    interior: tuple[Node, ...]
    route: Route | None
    spec: BlockSpec
    wiring: Wiring | None = None

    @property
    def stages(self) -> tuple[Node, Node, Node]:
        """The generic operators, in order."""
        return self.dispatch, self.mlp, self.combine

    @property
    def x(self) -> Node:
        return argument(self.dispatch, "x")

    @property
    def x_scale(self) -> Node | None:
        return argument(self.dispatch, "x_scale")

    @property
    def x_smooth(self) -> Node | None:
        return argument(self.dispatch, "x_smooth")

    @property
    def ids(self) -> Node:
        return argument(self.dispatch, "ids")

    @property
    def mask(self) -> Node | None:
        return argument(self.dispatch, "mask")

    @property
    def weights(self) -> Node:
        return argument(self.combine, "weights")

    @property
    def experts(self) -> GroupedMlpCall[Node]:
        """The arguments of its grouped MLP, by name."""
        return read(GroupedMlpCall[Node], self.mlp)
