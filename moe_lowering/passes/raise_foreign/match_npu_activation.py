"""The activation between two grouped matmuls: an operator of torch_npu, or the same written in ATen.

What is computed, and not in which order it is written: the result is a product of something of the gate and something of the
other half. Halves are ``split``, ``chunk``, ``slice`` of the last axis, even and odd columns are slices with step 2.
Only the gate first is known: ``grouped_mlp`` has no other.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.passes.arguments import argument
from moe_lowering.passes.raise_foreign.chain_walk import (
    Walk,
    is_operator,
    other_operator,
    require,
    require_value,
    value_of,
)
from moe_lowering.passes.raise_foreign.records import NotThisForm
from moe_lowering.vocabulary import ACTIVATIONS, SWIGLU_ALPHA

aten = torch.ops.aten
CLAMPS_AFTER = "swiglu_clamp_after"  # silu(gate) at most L, times the other half within +-L
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)


@dataclasses.dataclass
class Activated:
    """[N, I], and the words of ``grouped_mlp`` for what made it from [N, 2I]."""

    result: Node
    words: dict[str, Any]


def words_of(name: str, limit: float = 0.0, alpha: float = SWIGLU_ALPHA, interleaved: bool = False) -> dict[str, Any]:
    """The arguments of ``grouped_mlp`` that name an activation."""
    return {"activation": name, "limit": limit, "alpha": alpha, "interleaved": interleaved}


def match_activation(walk: Walk, hidden: Node) -> Activated:
    """Of hidden [N, 2I].

    Raises:
        NotThisForm: ``raise.activation``, or what keeps it from being read.
    """
    readers = walk.readers(hidden)
    if len(readers) == 1 and is_operator(readers[0], "npu_swiglu"):
        node = readers[0]
        walk.add(node)
        require_value(node, "input", hidden)
        require(node, {"dim": (-1, value_of(hidden).dim() - 1)})
        return Activated(node, words_of("swiglu"))
    if len(readers) == 1 and is_operator(readers[0], "npu_clipped_swiglu"):
        return _clipped(walk, readers[0], hidden)
    return _composed(walk, hidden, readers)


def _clipped(walk: Walk, node: Node, hidden: Node) -> Activated:
    walk.add(node)
    require_value(node, "x", hidden)
    require(node, {"group_index": (None,), "dim": (-1, value_of(hidden).dim() - 1)})
    limit, alpha, bias = (argument(node, name) for name in ("limit", "alpha", "bias"))
    return Activated(node, clipped_words(node, limit, alpha, bias, argument(node, "interleaved")))


def clipped_words(node: Node, limit: Any, alpha: Any, bias: Any, interleaved: bool) -> dict[str, Any]:
    """gate * sigmoid(alpha * gate) * (up + bias) of clamped halves, in the words of ``grouped_mlp``."""
    if bias == 1.0:
        name = "swiglu_oai"
    elif bias == 0.0 and alpha == 1.0:
        name, alpha = "swiglu_clamp", SWIGLU_ALPHA
    else:
        raise NotThisForm(
            node,
            "raise.activation",
            f"{node.name}: alpha is {alpha}, bias is {bias}",
            "bias 1 (swiglu_oai), or alpha 1 and bias 0",
        )
    return words_of(name, limit, alpha, interleaved)


@dataclasses.dataclass
class _Term:
    """One factor of the product: which half it is made of (0 or 1), and what was done to it, in order."""

    half: int
    interleaved: bool
    steps: tuple[Any, ...] = ()


def _composed(walk: Walk, hidden: Node, readers: list[Node]) -> Activated:
    """Every value from the halves on is a term of one half, until two of them are multiplied."""
    terms = _halves(walk, hidden, readers)
    pending = list(terms)
    while pending:
        node = pending.pop()
        term = terms[node]
        users = walk.readers(node)
        if len(users) != 1:
            raise NotThisForm(
                node,
                "raise.single_use",
                f"{node.name}, a half of the first matmul's result, has {len(users)} readers",
                "one reader",
            )
        user = users[0]
        if user.target is aten.mul.Tensor and all(isinstance(each, Node) for each in user.args):
            if all(each in terms for each in user.args):
                walk.add(user)
                return Activated(user, _product(user, *(terms[each] for each in user.args)))  # type: ignore[index]
            continue  # the other factor is not there yet
        step = _step(user, node)
        if step is None:
            raise NotThisForm(
                user,
                "raise.activation",
                f"{user.name} ({user.target}) is in no activation that is known",
                "silu, clamped silu or gelu of the gate, times the other half",
            )
        walk.add(user)
        terms[user] = _Term(term.half, term.interleaved, (*term.steps, *step))
        pending.append(user)
    raise NotThisForm(
        hidden,
        "raise.activation",
        f"the halves of {hidden.name} are not multiplied with each other",
        "silu, clamped silu or gelu of the gate, times the other half",
    )


def _halves(walk: Walk, hidden: Node, readers: list[Node]) -> dict[Node, _Term]:
    width = value_of(hidden).shape[-1]
    last = value_of(hidden).dim() - 1
    terms: dict[Node, _Term] = {}
    for reader in readers:
        if reader.target in _SPLITS and argument(reader, "dim") in (-1, last):
            walk.add(reader)
            if argument(reader, _SIZES[reader.target]) not in _equal_parts(reader.target, width):
                raise NotThisForm(
                    reader,
                    "raise.activation",
                    f"{reader.name} does not split {width} columns in two halves",
                    "silu, clamped silu or gelu of the gate, times the other half",
                )
            for item in reader.users:
                index = item.args[1]
                if item.target is not operator.getitem or index not in (0, 1):
                    raise NotThisForm(
                        item,
                        "raise.activation",
                        f"{item.name} takes no half of {reader.name}",
                        "silu, clamped silu or gelu of the gate, times the other half",
                    )
                walk.add(item)
                terms[item] = _Term(0 if index == 0 else 1, False)
        elif reader.target is aten.slice.Tensor and argument(reader, "dim") in (-1, last):
            walk.add(reader)
            terms[reader] = _slice(reader, width)
        else:
            seen, known = (
                f"the first matmul's result goes to {reader.name} ({reader.target})",
                other_operator(reader, "", ""),
            )
            code = known.record.code if known.record.code != "raise.operation_between" else "raise.activation"
            raise NotThisForm(
                reader,
                code,
                seen,
                "silu, clamped silu or gelu of the gate, times the other half, of operators that are known",
            )
    if sorted((term.half, term.interleaved) for term in terms.values()) not in _PAIRS:
        raise NotThisForm(
            hidden,
            "raise.activation",
            f"{hidden.name} is not taken apart into two halves, once each",
            "silu, clamped silu or gelu of the gate, times the other half",
        )
    return terms


_PAIRS = ([(0, False), (1, False)], [(0, True), (1, True)])
_SIZES = {
    aten.split.Tensor: "split_size",
    aten.split_with_sizes.default: "split_sizes",
    aten.chunk.default: "chunks",
}


def _equal_parts(target: Any, width: int) -> tuple[Any, ...]:
    if width % 2:
        return ()
    if target is aten.split_with_sizes.default:
        return ([width // 2] * 2,)
    return (2,) if target is aten.chunk.default else (width // 2,)


def _slice(node: Node, width: int) -> _Term:
    start, end, step = (argument(node, name) for name in ("start", "end", "step"))
    start, end = start or 0, width if end is None or (isinstance(end, int) and end >= width) else end
    for half, bounds in enumerate(((0, width // 2, 1), (width // 2, width, 1))):
        if (start, end, step) == bounds:
            return _Term(half, False)
    for half in (0, 1):
        if (start, end, step) == (half, width, 2):
            return _Term(half, True)
    raise NotThisForm(
        node, "raise.activation", f"{node.name} takes columns {start} to {end} in steps of {step}", "a half"
    )


def _step(node: Node, value: Node) -> tuple[Any, ...] | None:
    """What a pointwise operator does to its first argument."""
    if not node.args or node.args[0] is not value:
        return None
    if node.target is aten.silu.default:
        return ("silu",)
    if node.target is aten.gelu.default:
        return ({"none": "gelu", "tanh": "gelu_tanh"}[argument(node, "approximate")],)
    bounds = {
        aten.clamp.default: ("min", "max"),
        aten.clamp_min.default: ("min",),
        aten.clamp_max.default: ("max",),
    }.get(node.target)  # type: ignore[call-overload]
    if bounds is None:
        return None
    low, high = (argument(node, name) if name in bounds else None for name in ("min", "max"))
    if not all(each is None or isinstance(each, (int, float)) for each in (low, high)):
        return None
    return (("clamp", -math.inf if low is None else float(low), math.inf if high is None else float(high)),)


def _product(node: Node, a: _Term, b: _Term) -> dict[str, Any]:
    """The activation of a product of two terms."""
    functions = {"silu", "gelu", "gelu_tanh"}
    gate, up = (a, b) if functions.intersection(s for s in a.steps if isinstance(s, str)) else (b, a)
    if a.half == b.half:
        raise NotThisForm(
            node,
            "raise.activation",
            f"{node.name} multiplies a half with itself",
            "silu, clamped silu or gelu of the gate, times the other half",
        )
    form = (gate.steps, up.steps)
    words: dict[str, Any] | None = None
    if form in (((name,), ()) for name in ("silu", "gelu", "gelu_tanh")):
        name = gate.steps[0]
        words = words_of("swiglu" if name == "silu" else name, interleaved=gate.interleaved)
    elif len(gate.steps) == 2 and gate.steps[1] == "silu" and len(up.steps) == 1:
        limit = gate.steps[0][2] if gate.steps[0][0] == "clamp" else math.nan
        if (
            gate.steps[0] == ("clamp", -math.inf, limit)
            and up.steps[0] == ("clamp", -limit, limit)
            and 0 < limit < math.inf
        ):
            words = words_of("swiglu_clamp", limit, interleaved=gate.interleaved)
    if words is None and CLAMPS_AFTER in ACTIVATIONS and gate.steps[:1] == ("silu",) and len(gate.steps) == 2:
        limit = gate.steps[1][2]
        if (
            gate.steps[1] == ("clamp", -math.inf, limit)
            and up.steps == (("clamp", -limit, limit),)
            and 0 < limit < math.inf
        ):
            words = words_of(CLAMPS_AFTER, limit, interleaved=gate.interleaved)
    if words is None:
        raise NotThisForm(
            node,
            "raise.activation",
            f"the gate goes through {gate.steps}, the other half through {up.steps}",
            "silu, clamped silu or gelu of the gate, times the other half",
        )
    if gate.half != 0:
        raise NotThisForm(node, "raise.gate_second", f"{node.name}: the gate is the second half", "the first")
    return words
