"""Rules of the experts' products, and of what is done to their results element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.fx import Node

from moe_lowering.passes.graph.arguments import argument, explicit_arguments
from moe_lowering.passes.graph.operator_names import call_name
from moe_lowering.passes.graph.own_writes import functional_name
from moe_lowering.passes.raise_foreign.meanings import (
    Value,
    feature,
    flat,
    mapped_value,
    match_dims,
    product,
    sizes,
    slots,
)
from moe_lowering.passes.raise_foreign.read_meanings import Reader, Rule, near_rule, rule
from moe_lowering.passes.raise_foreign.rules_of_masks import clamped_ids
from moe_lowering.passes.raise_foreign.rules_of_routing import order_of_ids, token_of_slot
from moe_lowering.passes.raise_foreign.terms import (
    CHOICE,
    Axis,
    Clamp,
    Dim,
    Dims,
    Ends,
    Expert,
    Gelu,
    Over,
    Pick,
    Plus,
    Relu,
    Sigmoid,
    Summed,
    Tanh,
    Tensor,
    Term,
    Times,
    Weighted,
)

# A number beyond it, or below one divided by it, may make infinity or zero of what it is multiplied with
_FAR = 2.0**40

# ------------------------------------------------------------------------------------------------------------ products


@rule("_grouped_mm", "grouped_mm_fallback")
def grouped_product(reader: Reader, node: Node) -> Value | None:
    """Rows in order of experts, times the matrix of each row's expert."""
    arguments = explicit_arguments(node)
    named: list[Any] = [*arguments.values()][:3]
    if len(named) < 3 or not all(isinstance(each, Node) for each in named):
        seen, expected = "a grouped product without offsets", "offsets of each expert's rows"
        return reader.refuse(node, "raise.offsets", seen, expected)
    rows_node, weight, offs = named
    rows, until = reader.value(rows_node), reader.value(offs)
    if rows is None:
        return None
    if until is None or not isinstance(until.term, Ends):
        return reader.refuse(
            node,
            "raise.offsets",
            f"offsets from {offs.name} ({call_name(offs)}), which are not known to be where the rows of each expert end",
            "the running sum of a histogram of the ids, with a bin for each expert",
        )
    ids, experts = until.term.ids, until.term.experts
    if arguments.get("bias") is not None or arguments.get("out_dtype") not in (None, rows_node.meta["val"].dtype):
        return reader.refuse(node, "raise.operation", "a grouped product with a bias or another dtype", "neither")
    if not is_in_order(reader, rows, ids):
        return reader.refuse(
            node,
            "raise.rows",
            f"rows from {rows_node.name} ({call_name(rows_node)}), which are not known to be in the order of their experts",
            "rows of tokens, by the permutation that a sort of the same ids returns",
        )
    if len(sizes(weight)) != 3 or sizes(weight)[0] != experts:
        return reader.refuse(
            node, "raise.experts", f"weights {sizes(weight)} for {experts} experts", f"[{experts}, K, N]"
        )
    return Value(
        (rows.dims[0], feature(sizes(node)[1])), Expert(rows.term, weight, transposed=False, ids=ids, experts=experts)
    )


def is_in_order(reader: Reader, rows: Value, ids: Tensor) -> bool:
    """Whether the lines of a value are all slots of ``ids`` in the order of a sort of them."""
    if len(rows.dims) != 2:
        return False
    if not rows.dims[0]:
        return product(slots(ids)) == 1
    return order_of_ids(reader, rows.dims[0]) == ids


@near_rule("bmm", "matmul")
def batched_product(reader: Reader, node: Node) -> Value | None:
    shapes = [sizes(each) for each in node.args[:2] if isinstance(each, Node)]
    if len(shapes) != 2 or [*map(len, shapes)] != [3, 3] or shapes[0][0] != shapes[1][0]:
        return None
    return _contract(reader, node.args[:2], "bij,bjk->bik")


@near_rule("einsum")
def einsum(reader: Reader, node: Node) -> Value | None:
    """Before decompositions: of two operands, over one dimension of both."""
    equation, operands = node.args[:2]
    is_pair = isinstance(equation, str) and isinstance(operands, (list, tuple)) and len(operands) == 2
    return _contract(reader, operands, str(equation).replace(" ", "")) if is_pair else None


def _contract(reader: Reader, operands: Any, equation: str) -> Value | None:
    """Rows times the gathered matrices of their experts; or results times routing weights, summed over choices.

    Args:
        equation: of ``einsum``, without spaces. Each letter stands once in a term, and is summed over where it is missing
            behind the arrow, which one of both operands is.
    """
    left, right = (reader.value(each) for each in operands)
    if left is None or right is None or not (left.is_slotted or right.is_slotted):
        return None
    terms = _letters(equation, (left, right))
    if terms is None:
        return None
    a, b, result = terms
    for letter in sorted({*a} & {*b}):
        pair = left.dims[a.index(letter)], right.dims[b.index(letter)]
        mapped = match_dims(*(pair[::-1] if isinstance(right.term, Pick) else pair))  # rows keep their axes
        if mapped is None:
            return None
        left, right = mapped_value(left, mapped), mapped_value(right, mapped)
    (over,) = {*a, *b} - {*result}
    dims = tuple(left.dims[a.index(n)] if n in a else right.dims[b.index(n)] for n in result)
    if len(set(flat(dims))) != len(flat(dims)):
        return None
    summed = left.dims[a.index(over)]
    for matrices, rows in ((right, left), (left, right)):
        if isinstance(matrices.term, Pick) and not isinstance(rows.term, Pick):
            return _times_matrices(matrices.term, rows.term, summed, dims)
    if len(summed) != 1 or summed[0].kind != CHOICE:
        return None
    for weights, rows in ((left, right), (right, left)):
        if isinstance(weights.term, Tensor) and not isinstance(rows.term, Tensor):
            return Value(dims, Summed(Weighted(rows.term, weights.term)))
    return None


def _letters(equation: str, operands: tuple[Value, Value]) -> tuple[str, str, str] | None:
    """The terms of an equation that sums over one letter of both operands; None of another one."""
    terms = equation.replace("->", ",").split(",")
    if (
        "->" not in equation
        or len(terms) != 3
        or not all(len({*term}) == len(term) and term.isalpha() for term in terms)
    ):
        return None
    a, b, result = terms
    once = {*a, *b} - {*result}
    fits = [len(term) for term in (a, b)] == [len(value.dims) for value in operands]
    return (a, b, result) if fits and len(once) == 1 and once <= {*a} & {*b} and {*result} <= {*a, *b} else None


def _times_matrices(matrices: Pick, rows: Term, summed: Dim, dims: Dims) -> Value | None:
    """``summed`` must be one of a matrix's two axes; the other one becomes the result's columns."""
    weight = matrices.source
    if len(weight.dims) != 3 or summed not in weight.dims[1:]:
        return None
    transposed = summed == weight.dims[2]
    columns = weight.dims[1 if transposed else 2]
    if len(columns) > 1 or columns == summed:
        return None
    size = product(columns)
    mapped: dict[Axis, Dim] = {axis: feature(size) for axis in columns}
    dims = tuple(tuple(new for axis in each for new in mapped.get(axis, (axis,))) for each in dims)
    experts = sizes(weight.node)[0]
    return Value(dims, Expert(rows, weight.node, transposed, matrices.ids, experts))


# ------------------------------------------------------------------------------------------------------- element by element


@near_rule("mul")
def multiplied(reader: Reader, node: Node) -> Value | None:
    pair = _operands(reader, node)
    if pair is None:
        return None
    if isinstance(pair, Value):
        number: Any = next(arg for arg in node.args[:2] if not isinstance(arg, Node))
        return Value(pair.dims, times(number, pair.term)) if _is_kept(number, node) else None
    dims, a, b = pair
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        rows, weights = (b, a) if isinstance(a, Tensor) and not (isinstance(b, Tensor) and _wider(a, b)) else (a, b)
        if not isinstance(weights, Tensor):
            return None
        if isinstance(rows, Weighted):
            return reader.refuse(
                node,
                "raise.weights_twice",
                f"rows that are weighted twice, by {rows.weights.node.name} and by {weights.node.name}",
                "one weight for each slot: what else scales the rows of an expert, as a factor of its w2",
            )
        return Value(dims, Weighted(rows, weights))
    return Value(dims, times(1.0, a, b))


def _is_kept(number: Any, node: Node) -> bool:
    """Whether a number may be multiplied with others first: no value of a node overflows by it, or is rounded away."""
    if not isinstance(number, (int, float)) or not node.meta["val"].is_floating_point():
        return False
    kind = torch.finfo(node.meta["val"].dtype)
    return number == 0 or max(kind.tiny, 1 / _FAR) <= abs(number) <= min(kind.max, _FAR)


def _wider(a: Tensor, b: Tensor) -> bool:
    return len(flat(a.dims)) > len(flat(b.dims))


def times(number: float, *terms: Term) -> Term:
    factors: list[Term] = []
    for term in terms:
        if isinstance(term, Times):
            number *= term.number
            factors += term.factors
        else:
            factors.append(term)
    if number == 1 and len(factors) == 1:
        return factors[0]
    return Times(float(number), tuple(sorted(factors, key=repr)))


@near_rule("add")
def added(reader: Reader, node: Node) -> Value | None:
    """A number, or the biases of the experts."""
    if explicit_arguments(node).get("alpha", 1) != 1:
        return None
    pair = _operands(reader, node)
    if pair is None:
        return None
    if isinstance(pair, Value):
        number = next(arg for arg in node.args[:2] if not isinstance(arg, Node))
        return None if not isinstance(number, (int, float)) else Value(pair.dims, Plus(pair.term, float(number)))
    dims, a, b = pair
    for term, bias in ((a, b), (b, a)):
        if isinstance(term, Expert) and isinstance(bias, Pick) and term.bias is None:
            if bias.ids != term.ids or len(bias.source.dims) != 2 or sizes(bias.source.node)[0] != term.experts:
                return reader.refuse(node, "raise.bias", "biases of other ids", "the bias [E, N] of each slot's expert")
            biased = Expert(term.rows, term.weight, term.transposed, term.ids, term.experts, bias.source.node)
            return Value(dims, biased)
    return None


def _operands(reader: Reader, node: Node) -> tuple[Dims, Term, Term] | Value | None:
    """Two operands over the same axes; the one that is a tensor beside a number; None of opaque tensors alone."""
    operands: list[Any] = list(node.args[:2])
    values = [reader.value(each) for each in operands if isinstance(each, Node)]
    if any(value is None for value in values) or not any(value.is_slotted for value in values if value):
        return None
    if len(values) == 1:
        return values[0]
    a, b = values
    assert a is not None and b is not None
    count = max(len(a.dims), len(b.dims))
    a, b = (Value(((),) * (count - len(v.dims)) + v.dims, v.term) for v in (a, b))
    for at in range(count):
        if a.dims[at] and b.dims[at]:
            mapped = match_dims(a.dims[at], b.dims[at])
            if mapped is None:
                return None
            a, b = mapped_value(a, mapped), mapped_value(b, mapped)
    dims = tuple(x or y for x, y in zip(a.dims, b.dims, strict=True))
    return None if len(set(flat(dims))) != len(flat(dims)) else (dims, a.term, b.term)


def _of_one(make: Callable[[Term], Term]) -> Rule:
    """The rule of an operator with one operand, by what it makes of the operand's term."""

    def read(reader: Reader, node: Node) -> Value | None:
        value = operand(reader, node)
        return None if value is None else Value(value.dims, make(value.term))

    return read


near_rule("silu")(_of_one(lambda term: times(1.0, term, Sigmoid(term))))
near_rule("sigmoid")(_of_one(Sigmoid))
near_rule("relu")(_of_one(Relu))
near_rule("tanh")(_of_one(Tanh))


@near_rule("gelu")
def gelu(reader: Reader, node: Node) -> Value | None:
    value = operand(reader, node)
    return None if value is None else Value(value.dims, Gelu(value.term, argument(node, "approximate")))


@near_rule("square", "pow")
def squared(reader: Reader, node: Node) -> Value | None:
    value = operand(reader, node)
    is_square = functional_name(node) == "square" or node.args[1] in (2, 2.0)
    return Value(value.dims, times(1.0, value.term, value.term)) if value is not None and is_square else None


@near_rule("clamp", "clamp_min", "clamp_max")
def clamped(reader: Reader, node: Node) -> Value | None:
    if not node.meta["val"].is_floating_point():
        return clamped_ids(reader, node)
    value, arguments = operand(reader, node), explicit_arguments(node)
    bounds = [arguments.get(name) for name in ("min", "max")]
    if value is None or not all(bound is None or isinstance(bound, (int, float)) for bound in bounds):
        return None
    low, high = (None if bound is None or abs(bound) == float("inf") else float(bound) for bound in bounds)
    return Value(value.dims, Relu(value.term) if (low, high) == (0.0, None) else Clamp(value.term, low, high))


@rule("floor_divide", "div")
def divided(reader: Reader, node: Node) -> Value | None:
    """A slot's number by k, or a row of the experts' by a number."""
    token = token_of_slot(reader, node)
    if token is not None:
        return token
    value, by = operand(reader, node), cast(Any, node.args[1])
    is_exact = functional_name(node) == "div" and explicit_arguments(node).get("rounding_mode") is None
    if value is None or not is_exact or not _is_kept(by, node) or by == 0:
        return None
    return Value(value.dims, Over(value.term, float(by)))


def operand(reader: Reader, node: Node) -> Value | None:
    """The operand of an operator with one, where it is more than an opaque tensor."""
    value = reader.value(node.args[0])
    return value if value is not None and value.is_slotted else None
