"""Which gated activation of ``grouped_mlp`` a term computes, whatever operators spell it in whatever order.

A product is a set of factors, silu(g) is g * sigmoid(g), so that one comparison tells. Numbers are read from the term.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from moe_lowering.passes.raise_foreign.terms import Clamp, Expert, Gelu, Part, Plus, Sigmoid, Term, Times
from moe_lowering.vocabulary import SWIGLU_ALPHA


@dataclasses.dataclass(frozen=True)
class Gated:
    """An activation of ``vocabulary.ACTIVATIONS``, its numbers, and the two columns that it takes."""

    activation: str
    limit: float
    alpha: float
    gate: Term
    up: Term


def match_activation(term: Term) -> Gated | None:
    """None of what is no gated activation of the vocabulary, or takes up for gate."""
    if not isinstance(term, Times) or term.number != 1:
        return None
    leaves = list(dict.fromkeys(_leaves(term)))
    if len(leaves) != 2:
        return None
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


def _product(*factors: Term) -> Term:
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
    elif isinstance(term, (Sigmoid, Gelu, Clamp, Plus)):
        yield term.term
