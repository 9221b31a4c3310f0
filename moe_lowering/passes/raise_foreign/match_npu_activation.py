"""The activation between two grouped matmuls: an operator of torch_npu, or the same written in ATen.

In ATen what is computed counts, not how it is written: the rules that read layers of ATen operators read it (``read_meanings``),
``match_activation`` knows it. Only the gate first is known: ``grouped_mlp`` has no other.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.passes.graph.arguments import argument
from moe_lowering.passes.graph.operator_names import call_name
from moe_lowering.passes.raise_foreign.chain_walk import (
    Walk,
    is_operator,
    other_operator,
    require,
    require_value,
    value_of,
)
from moe_lowering.passes.raise_foreign.closed_region import looks_only
from moe_lowering.passes.raise_foreign.match_activation import Gated, match_activation
from moe_lowering.passes.raise_foreign.meanings import Value, dim, feature, sizes
from moe_lowering.passes.raise_foreign.read_meanings import Reader
from moe_lowering.passes.raise_foreign.records import NotThisForm
from moe_lowering.passes.raise_foreign.terms import SORTED, Axis, Expert, Part, Tensor
from moe_lowering.vocabulary import SWIGLU_ALPHA


@dataclasses.dataclass
class Activated:
    """[N, I], and the words of ``grouped_mlp`` for what made it from [N, 2I], or from gate and up [N, I].

    ``order``: of gate and up that are two values, which is the gate, and which is up.
    """

    result: Node
    words: dict[str, Any]
    order: tuple[int, ...] = (0, 1)

    def ordered(self, firsts: tuple[Node, ...], hidden: tuple[Node, ...]) -> tuple[Node, ...]:
        """The matmuls of gate and up in that order; others, whose results are one value, as they are."""
        return firsts if len(hidden) == 1 else tuple(firsts[at] for at in self.order)


def words_of(name: str, limit: float = 0.0, alpha: float = SWIGLU_ALPHA, interleaved: bool = False) -> dict[str, Any]:
    """The arguments of ``grouped_mlp`` that name an activation."""
    return {"activation": name, "limit": limit, "alpha": alpha, "interleaved": interleaved}


def match_npu_gate(walk: Walk, hidden: tuple[Node, ...]) -> Activated:
    """Of hidden [N, 2I], [N, I] without a gate, or of gate and up [N, I].

    Raises:
        NotThisForm: ``raise.activation``, or what keeps it from being read.
    """
    readers = walk.readers(hidden[0])
    if len(hidden) == len(readers) == 1 and is_operator(readers[0], "npu_swiglu"):
        node = readers[0]
        walk.add(node)
        require_value(node, "input", hidden[0])
        require(node, {"dim": (-1, value_of(hidden[0]).dim() - 1)})
        return Activated(node, words_of("swiglu"))
    if len(hidden) == len(readers) == 1 and is_operator(readers[0], "npu_clipped_swiglu"):
        return _clipped(walk, readers[0], hidden[0])
    return _composed(walk, hidden)


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


_KNOWN = "an activation that grouped_mlp has, of gate and up or without a gate, in operators of ATen"


def _composed(walk: Walk, hidden: tuple[Node, ...]) -> Activated:
    """Operators of ATen between hidden and what is no such operator, by what they compute."""
    region, result = _region(walk, hidden)
    width = sizes(hidden[0])[-1]
    reader = Reader(hidden)
    rows = dim(Axis(SORTED, sizes(hidden[0])[0], hidden[0]))
    for node in hidden:
        itself = Tensor(node, ())
        reader.assume(node, Value((rows, feature(sizes(node)[-1])), Expert(itself, node, False, itself, 0)))
    value = reader.value(result)
    if value is None:
        reason = next((reader.reasons[node] for node in region if node in reader.reasons), None)
        unknown = next(
            node for node in region if isinstance(node.meta.get("val"), torch.Tensor) and reader.value(node) is None
        )
        seen = f"{unknown.name} ({call_name(unknown)}) is in no activation that is known"
        raise NotThisForm(unknown, "raise.activation", seen if reason is None else reason.record.seen, _KNOWN)
    gated = match_activation(value.term)
    if gated is None or value.dims != (rows, feature(getattr(gated.gate, "size", width))):
        raise NotThisForm(
            result,
            "raise.activation",
            f"{result.name} is no product of an activation of one half and the other, nor one of all columns",
            _KNOWN,
        )
    _require_precision(region, hidden[0], result)
    _require_last(walk, result)
    walk.add(*region)
    words = words_of(gated.activation, gated.limit, gated.alpha, _columns(result, gated, width, len(hidden)))
    places = tuple(hidden.index(each.weight) for each in (gated.gate, gated.up) if isinstance(each, Expert))
    return Activated(result, words, places if len(hidden) == 2 else (0, 1))


def _region(walk: Walk, hidden: tuple[Node, ...]) -> tuple[list[Node], Node]:
    """The operators of ATen that are computed from hidden, in graph order, and the one value of theirs that others read."""
    region: dict[Node, None] = {}
    pending, results = [*hidden], set[Node]()
    while pending:
        node = pending.pop()
        for user in walk.readers(node):
            if user.target is not operator.getitem and getattr(user.target, "namespace", "") != "aten":
                results.add(node)
                if node in hidden:
                    _require_known(node, user)
            elif user not in region:
                region[user] = None
                pending.append(user)
    if len(results) != 1 or len(region) > _LARGEST:
        names = ", ".join(sorted(node.name for node in results)) or "nothing"
        seen = f"of what is computed from {', '.join(node.name for node in hidden)} others read {names}"
        raise NotThisForm(hidden[0], "raise.activation", seen, f"one value of at most {_LARGEST} operations; {_KNOWN}")
    (result,) = results
    needed, todo = {result}, [result]
    while todo:
        fresh = [node for node in todo.pop().all_input_nodes if node in region and node not in needed]
        needed.update(fresh)
        todo += fresh
    for node in sorted(region):
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise NotThisForm(
                node, "raise.written_between", f"{node.name} ({call_name(node)}) writes in place", "none of it"
            )
        if node not in needed and not looks_only(node):
            raise NotThisForm(
                node,
                "raise.single_use",
                f"{node.name} ({call_name(node)}) reads the activation's values too",
                result.name,
            )
    return sorted(region), result


_LARGEST = 64  # operations that an activation may have


def _require_known(hidden: Node, user: Node) -> None:
    """Of hidden itself only ATen reads; the reason is that of the operator where it is known."""
    code = other_operator(user, "", "").record.code
    code = code if code != "raise.operation_between" else "raise.activation"
    raise NotThisForm(user, code, f"{hidden.name} goes to {user.name} ({call_name(user)})", _KNOWN)


def _require_last(walk: Walk, result: Node) -> None:
    """No other activation comes after it."""
    for user in walk.readers(result):
        if is_operator(user, *_ACTIVATIONS):
            seen = f"{result.name} ({call_name(result)}) goes to {user.name} ({call_name(user)})"
            raise NotThisForm(result, "raise.activation", seen, f"one activation; {_KNOWN}")


_ACTIVATIONS = ("npu_swiglu", "npu_clipped_swiglu", "npu_swiglu_quant", "npu_dequant_swiglu_quant")


def _require_precision(region: list[Node], hidden: Node, result: Node) -> None:
    """As precise as hidden or float32 all the way, and in its dtype at the end."""
    own = value_of(hidden).dtype
    for node in region:
        value = node.meta.get("val")
        accepted = (own,) if node is result else (own, torch.float32)
        if isinstance(value, torch.Tensor) and value.dtype not in accepted:
            expected = " or ".join(map(str, accepted))
            raise NotThisForm(node, "raise.dtype", f"{node.name} is {value.dtype} in an activation of {own}", expected)


def _columns(node: Node, gated: Gated, width: Any, values: int) -> bool:
    """Whether gate and up are every other column; else they are the halves, gate first, or one of two values each."""
    gate, up = gated.gate, gated.up
    if isinstance(gate, Expert) and (isinstance(up, Expert) if values == 2 else up is None):
        return False
    if (
        values == 1
        and isinstance(gate, Part)
        and isinstance(up, Part)
        and gate.size == up.size == width // 2
        and width % 2 == 0
    ):
        places = ((gate.start, gate.step), (up.start, up.step))
        for first, second, interleaved in (((0, 1), (width // 2, 1), False), ((0, 2), (1, 2), True)):
            if places == (first, second):
                return interleaved
            if places == (second, first):
                raise NotThisForm(node, "raise.gate_second", f"{node.name}: the gate is the second half", "the first")
    raise NotThisForm(node, "raise.activation", f"{node.name} is not made of two halves of {width} columns", _KNOWN)
