"""Records of what a node of a router holds, in terms of ``route``: scores, groups of them, masks, chosen ids, weights.

``meaning`` makes the record of a node from those of its arguments, by the rule of its operator, so a router is proven
by what it computes and not by the order of its nodes. A node without a rule, or whose rule does not hold, is
``Opaque``: a tensor of which nothing is known; it may still be the logits.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.passes.blocks import Source
from moe_lowering.passes.graph.operator_names import call_name

FLOAT16 = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why a value is not what a router needs: a stable code, the node, what was seen there, what was expected.

    Its text has the operator and neither the node's name nor its line, which the report has: equal layers have equal texts.
    """

    code: str
    node: Node
    seen: str
    expected: str

    def __str__(self) -> str:
        return f"[{self.code}] at {call_name(self.node)}: {self.seen}; expected: {self.expected}"


@dataclasses.dataclass(frozen=True)
class Opaque:
    """Any value. ``why``: what kept it from being one of the others, where it looked like one."""

    node: Node
    why: Reason | None = None


@dataclasses.dataclass(frozen=True)
class Const:
    """A tensor with one number everywhere."""

    number: float


@dataclasses.dataclass(frozen=True)
class Groups:
    """Groups of experts of which the best stay."""

    count: int
    kept: int
    score: str


@dataclasses.dataclass(frozen=True)
class Scores:
    """[..., E]. ``scoring`` "" is the logits themselves.

    Attributes:
        logits: the node that they are computed from, before casts that lose nothing.
        source: the same, for later.
        bias, bias_source: added to all rows.
        groups, fill: experts outside of the best groups have the value ``fill``.
        rounded: the dtype of 16 bits that the scores went through, None when all was float32.
    """

    logits: Node
    source: Source
    scoring: str = ""
    bias: Node | None = None
    bias_source: Source | None = None
    groups: Groups | None = None
    fill: float = 0.0
    rounded: torch.dtype | None = None
    why: Reason | None = None

    def alike(self, other: Scores) -> bool:
        """Whether both are the same numbers but for what groups drop."""
        own = (self.logits, self.scoring, self.bias, self.rounded)
        return own == (other.logits, other.scoring, other.bias, other.rounded)


@dataclasses.dataclass(frozen=True)
class Grouped:
    """[..., G, E / G]: scores by groups."""

    scores: Scores
    count: int


@dataclasses.dataclass(frozen=True)
class BestTwo:
    """[..., G, 2]: the two largest scores of each group."""

    of: Grouped


@dataclasses.dataclass(frozen=True)
class GroupScore:
    """[..., G]: ``max``, or ``top2_sum``."""

    of: Grouped
    score: str


@dataclasses.dataclass(frozen=True)
class GroupIds:
    """[..., kept]: the groups with the largest scores."""

    of: GroupScore
    kept: int


@dataclasses.dataclass(frozen=True)
class Mask:
    """[..., G], [..., G, 1 or E / G] or [..., E] of bools, or of 0 and 1: which experts are in the best groups, or (not
    ``keeps``) which are not."""

    ids: GroupIds
    keeps: bool
    level: str  # "group", "spread", "expert"

    @property
    def groups(self) -> Groups:
        return Groups(self.ids.of.of.count, self.ids.kept, self.ids.of.score)


@dataclasses.dataclass(frozen=True)
class Selection:
    """The node that chooses the ``k`` largest of ``scores``."""

    node: Node
    scores: Scores
    k: int


@dataclasses.dataclass(frozen=True)
class Chosen:
    """[..., k]: the ids of a selection."""

    by: Selection


@dataclasses.dataclass(frozen=True)
class Taken:
    """[..., k]: scores at the ids of a selection, and what was done to them, in this order: divided by their sum plus
    ``epsilon``, multiplied by ``scale``, rounded to a dtype of 16 bits (``rounded``)."""

    by: Selection
    scores: Scores
    renormalised: bool = False
    epsilon: float = 0.0
    scale: float | None = None
    rounded: bool = False


@dataclasses.dataclass(frozen=True)
class Total:
    """[..., 1], or [...]: the sum over k of weights, plus ``epsilon``."""

    of: Taken
    epsilon: float | None = None


Value = Opaque | Const | Scores | Grouped | BestTwo | GroupScore | GroupIds | Mask | Chosen | Taken | Total


def val(node: Any) -> torch.Tensor | None:
    """The fake value of a node that is a tensor."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def last(node: Any, count: int = 1) -> tuple[int, ...] | None:
    """The last sizes of a tensor where they are plain ints."""
    value = val(node)
    if value is None or value.dim() < count:
        return None
    sizes = tuple(value.shape[value.dim() - count :])
    return sizes if all(type(size) is int for size in sizes) else None
