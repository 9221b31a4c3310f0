"""Which activation of ``grouped_mlp`` a term computes, whatever operators spell it in whatever order.

A product is a set of factors, silu(g) is g * sigmoid(g), so that one comparison tells. Numbers are read from the term.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

from moe_lowering.passes.raise_foreign.terms import (
    Clamp,
    Expert,
    Gelu,
    Over,
    Part,
    Plus,
    Relu,
    Sigmoid,
    Tanh,
    Term,
    Times,
)
from moe_lowering.vocabulary import SWIGLU_ALPHA


@dataclasses.dataclass(frozen=True)
class Gated:
    """An activation of ``vocabulary.ACTIVATIONS``, its numbers, and the two columns that it takes, or the one without a gate."""

    activation: str
    limit: float
    alpha: float
    gate: Term
    up: Term | None


def match_activation(term: Term) -> Gated | None:
    """None of what is no activation of the vocabulary, or takes up for gate."""
    leaves = list(dict.fromkeys(_leaves(term)))
    if len(leaves) == 1:
        (up,) = leaves
        name = next((name for name, make in _UNGATED.items() if make(up) == term), None)
        return None if name is None else Gated(name, 0.0, SWIGLU_ALPHA, up, None)
    if not isinstance(term, Times) or len(leaves) != 2:
        return None
    if any(isinstance(factor, Tanh) for factor in term.factors):
        return _match_softcap(term, leaves)
    limits = {bound for bound in _bounds(term) if bound is not None}
    alphas = {t.term.number for t in term.factors if isinstance(t, Sigmoid) and isinstance(t.term, Times)} or {1.0}
    for gate, up in (leaves, leaves[::-1]):
        for name, make in _FORMS.items():
            for limit in limits or {0.0}:
                for alpha in alphas:
                    if make(gate, up, limit, alpha) == term:
                        clamped = limit if limits else 0.0
                        return Gated(name, clamped, alpha if name == "swiglu_oai" else SWIGLU_ALPHA, gate, up)
    return None


def _match_softcap(term: Times, leaves: list[Term]) -> Gated | None:
    """cap(g, limit) * sigmoid(g) * cap(u, alpha), whose caps are a factor of the product and a divisor inside."""
    caps = {f.term.term: f.term.number for f in term.factors if isinstance(f, Tanh) and isinstance(f.term, Over)}
    for gate, up in (leaves, leaves[::-1]):
        limit, alpha = caps.get(gate, 0.0), caps.get(up, 0.0)
        made = _product(Tanh(Over(gate, limit)), Sigmoid(gate), Tanh(Over(up, alpha)))
        if made.factors == term.factors and limit > 0 and alpha > 0 and math.isclose(term.number, limit * alpha):
            return Gated("swiglu_softcap", limit, alpha, gate, up)
    return None


def _product(*factors: Term) -> Times:
    return Times(1.0, tuple(sorted(factors, key=repr)))


def _swiglu(gate: Term, up: Term, limit: float, alpha: float) -> Term:
    return _product(gate, Sigmoid(gate), up)


def _swiglu_clamp(gate: Term, up: Term, limit: float, alpha: float) -> Term:
    return _swiglu(Clamp(gate, None, limit), Clamp(up, -limit, limit), 0.0, alpha)


def _swiglu_clamp_after(gate: Term, up: Term, limit: float, alpha: float) -> Term:
    return _product(Clamp(_product(gate, Sigmoid(gate)), None, limit), Clamp(up, -limit, limit))


def _swiglu_oai(gate: Term, up: Term, limit: float, alpha: float) -> Term:
    low, bounded = Clamp(gate, None, limit), Clamp(up, -limit, limit)
    inside = low if alpha == 1 else Times(alpha, (low,))
    return _product(low, Sigmoid(inside), Plus(bounded, 1.0))


def _gelu(gate: Term, up: Term, limit: float, alpha: float) -> Term:
    return _product(Gelu(gate, "none"), up)


def _gelu_tanh(gate: Term, up: Term, limit: float, alpha: float) -> Term:
    return _product(Gelu(gate, "tanh"), up)


_FORMS: dict[str, Callable[[Term, Term, float, float], Term]] = {
    "swiglu": _swiglu,
    "swiglu_clamp": _swiglu_clamp,
    "swiglu_clamp_after": _swiglu_clamp_after,
    "swiglu_oai": _swiglu_oai,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}
_UNGATED: dict[str, Callable[[Term], Term]] = {
    "relu": Relu,
    "relu2": lambda up: _product(Relu(up), Relu(up)),
    "silu": lambda up: _product(up, Sigmoid(up)),
    "gelu_ungated": lambda up: Gelu(up, "none"),
    "gelu_tanh_ungated": lambda up: Gelu(up, "tanh"),
}


def _leaves(term: Term) -> Iterator[Term]:
    """The experts' results, or the columns of one, that a term is computed from."""
    if isinstance(term, (Expert, Part)):
        yield term
        return
    for inner in _inner(term):
        yield from _leaves(inner)


def _bounds(term: Term) -> Iterator[float | None]:
    if isinstance(term, Clamp):
        yield term.high
    if not isinstance(term, (Expert, Part)):
        for inner in _inner(term):
            yield from _bounds(inner)


def _inner(term: Term) -> Iterator[Term]:
    if isinstance(term, Times):
        yield from term.factors
    elif isinstance(term, (Sigmoid, Gelu, Clamp, Plus, Over, Relu, Tanh)):
        yield term.term
