"""Records of what the elements of a value are, for layers that others wrote: ``Axis`` and the subclasses of ``Term``.

A slot is a pair of a token and one of its k choices. "In order of experts" means slots sorted by their expert's id. Two
nodes compute the same where their terms are equal. Terms know no rules, and no layout: along which axes the dimensions
of a tensor run is in the ``Value`` around a term (``meanings``).
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

from torch.fx import Node
from typing_extensions import dataclass_transform

TENSOR, SPREAD, TOKEN, CHOICE, SORTED, FEATURE = "tensor", "spread", "token", "choice", "sorted", "feature"


@dataclasses.dataclass(frozen=True)
class Axis:
    """An index that a dimension runs over.

    ``tensor``: of an opaque tensor; ``spread``: along it nothing changes (expand); ``token`` and ``choice``: of the ids ``of``;
    ``sorted``: slots in the order that the sort ``of`` gives; ``feature``: columns of an expert's result, by position.
    ``size`` is an int or a sympy expression.
    """

    kind: str
    size: Any
    of: Node | None = None
    index: int = 0


Dim: TypeAlias = tuple[Axis, ...]


Dims: TypeAlias = tuple[Dim, ...]


@dataclass_transform(frozen_default=True)
@dataclasses.dataclass(frozen=True)
class Term:
    """What the elements of a value are. Each term is a frozen record of its fields: subclasses need not say so."""

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(frozen=True)(cls)


class Tensor(Term):
    """The elements of a node. ``dims`` says which index runs over each of its dimensions; of three dimensions or more that
    were flattened, all but the last count as one."""

    node: Node
    dims: Dims


class Slot(Term):
    """The number of a slot, token * k + choice. In order of experts: the permutation that a sort of ids returns."""

    ids: Tensor


class Place(Term):
    """Where a slot stands in the order of experts: the inverse of that permutation. ``order`` is the sorted axis."""

    ids: Tensor
    order: Axis


class TokenOf(Term):
    """The number of a slot's token."""

    ids: Tensor


class Position(Term):
    """0, 1, 2, ... along the dimension ``over``; what was spread or moved since has other dimensions than that one."""

    over: Dim


class Counts(Term):
    """How many slots each of ``experts`` experts has, by expert."""

    ids: Tensor
    experts: int


class OneHot(Term):
    """Whether a slot's expert is the one that the dimension of experts, the only one of columns, is at: summed over those axes
    of the slots that are not among the dimensions."""

    ids: Tensor
    experts: int


class Past(Term):
    """Whether a slot's id is ``experts`` or more."""

    ids: Tensor
    experts: int


class Ends(Term):
    """Where the rows of each expert end in the order of experts."""

    ids: Tensor
    experts: int


class Pick(Term):
    """The matrix, or the bias, of a slot's expert: ``source[ids]``."""

    source: Tensor
    ids: Tensor


class Expert(Term):
    """A slot's row times its expert's matrix, and its bias.

    ``weight`` is [E, K, N], or [E, N, K] when ``transposed``; ``bias`` [E, N].
    """

    rows: Term
    weight: Node
    transposed: bool
    ids: Tensor
    experts: int
    bias: Node | None = None


class Part(Term):
    """Every ``step``-th column of a result from ``start`` on, ``size`` of them."""

    whole: Term
    start: int
    step: int
    size: int


class Times(Term):
    """A product, of a number and terms in an order of their own."""

    number: float
    factors: tuple[Term, ...]


class Plus(Term):
    """A term and a number."""

    term: Term
    number: float


class Over(Term):
    """A term divided by a number."""

    term: Term
    number: float


class Relu(Term):
    term: Term


class Tanh(Term):
    term: Term


class Sigmoid(Term):
    term: Term


class Gelu(Term):
    """``approximate`` is ``none`` or ``tanh``."""

    term: Term
    approximate: str


class Clamp(Term):
    """None is no bound."""

    term: Term
    low: float | None
    high: float | None


class Weighted(Term):
    """Rows times a number for each slot."""

    rows: Term
    weights: Tensor


class Summed(Term):
    """The sum over the choices of a token, and of ``base`` [T, H] where there is one."""

    rows: Term
    base: Node | None = None
