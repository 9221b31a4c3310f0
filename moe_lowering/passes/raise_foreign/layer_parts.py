"""What a layer's result is made of, read from its term and checked: see ``match_experts`` for what the term must be."""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import Node

from moe_lowering.passes.raise_foreign.joined_storage import joined_storage
from moe_lowering.passes.raise_foreign.match_activation import Gated, match_activation
from moe_lowering.passes.raise_foreign.meanings import (
    Value,
    choices,
    feature,
    flat,
    product,
    sizes,
    slots,
    tokens,
)
from moe_lowering.passes.raise_foreign.records import ForeignBlock, NotThisForm, Weights
from moe_lowering.passes.raise_foreign.terms import (
    Expert,
    Part,
    Summed,
    Tensor,
    Weighted,
)

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class LayerParts:
    """The parts of a layer's term: products, activation, weights, tokens. Each raises ``NotThisForm`` where it is another one.

    Args:
        result: the node of the layer's result. value: its meaning.
    """

    def __init__(self, result: Node, value: Value) -> None:
        self.result, self.value = result, value
        term = value.term
        self.base = term.base if isinstance(term, Summed) else None
        rows = term.rows if isinstance(term, Summed) else term
        self.weights = rows.weights if isinstance(rows, Weighted) else None
        second = rows.rows if isinstance(rows, Weighted) else rows
        if self.weights is None and isinstance(second, Expert) and isinstance(second.rows, Weighted):
            if second.bias is not None:
                raise self._not(
                    "raise.weights", "weights in front of a product whose biases they do not reach", "after it"
                )
            if second.weight.meta["val"].dtype is torch.float16:
                raise self._not(
                    "raise.dtype",
                    "weights in front of a product in float16, which without them may overflow",
                    "after it, or a dtype of the range of float32",
                )
            self.weights, second = second.rows.weights, dataclasses.replace(second, rows=second.rows.rows)
        self.second = second

    def block(self, form: str) -> ForeignBlock:
        """The layer's record, without the nodes inside."""
        second = self.second
        if not isinstance(second, Expert):
            raise self._not(
                "raise.operation", "a sum of something else than the experts' results", "w2's products, weighted"
            )
        gated = self._activation(second)
        firsts, interleaved = self._first_products(gated)
        first = firsts[0]
        x, weigh_input = self._tokens(first)
        weights = first.rows.weights if self.weights is None and isinstance(first.rows, Weighted) else self.weights
        self._require_slots(second, firsts, x, weights, weigh_input)
        assert weights is not None
        self._require_one_dtype([*firsts, second])
        w13 = Weights(tuple(e.weight for e in firsts), first.transposed, len(firsts) == 2)
        if w13.joined and not first.bias:
            w13 = joined_storage(w13) or w13
        return ForeignBlock(
            form=form,
            result=self.result,
            interior=(),
            x=x.node,
            ids=second.ids.node,
            weights=weights.node,
            num_experts=second.experts,
            w13=w13,
            w2=Weights((second.weight,), second.transposed),
            activation=gated.activation,
            limit=gated.limit,
            alpha=gated.alpha,
            interleaved=interleaved,
            w13_bias=tuple(e.bias for e in firsts if e.bias is not None),
            w2_bias=() if second.bias is None else (second.bias,),
            weigh_input=weigh_input,
            bases=() if self.base is None else (self.base,),
        )

    def _activation(self, second: Expert) -> Gated:
        gated = match_activation(second.rows)
        if gated is None:
            raise self._not(
                "raise.activation",
                "between the two products something that is no activation of grouped_mlp (or gate and up exchanged)",
                "silu, clamped silu, the gates of gpt-oss and inkling2, or gelu, of the gate, times up; relu, relu2, silu, gelu",
            )
        return gated

    def _require_one_dtype(self, products: list[Expert]) -> None:
        dtypes = {each.weight.meta["val"].dtype for each in products}
        if len(dtypes) != 1 or not dtypes <= {*_FLOATS}:
            raise self._not(
                "raise.dtype", f"weights of {', '.join(map(str, dtypes))}", "one of float32, float16, bfloat16"
            )

    def _not(self, code: str, seen: str, expected: str) -> NotThisForm:
        return NotThisForm(self.result, code, seen, expected)

    def _first_products(self, gated: Gated) -> tuple[list[Expert], bool]:
        """The product that gate and up are columns of, or the two that they are; and whether columns alternate."""
        gate, up = gated.gate, gated.up
        if up is None:
            if isinstance(gate, Expert):
                return [gate], False
            raise self._not("raise.gate", "some columns of a product", "all of them, as there is no gate")
        if (
            isinstance(gate, Part)
            and isinstance(up, Part)
            and gate.whole == up.whole
            and isinstance(gate.whole, Expert)
        ):
            size = gate.size
            if (gate.step, up.step, gate.start, up.start) == (2, 2, 0, 1) and up.size == size:
                return [gate.whole], True
            if (gate.step, up.step, gate.start, up.start) == (1, 1, 0, size) and up.size == size:
                return [gate.whole], False
            raise self._not(
                "raise.gate",
                f"gate and up are columns {gate.start} and {up.start} on, every {gate.step} and {up.step}",
                "gate first, then up, or alternating from gate on",
            )
        if isinstance(gate, Expert) and isinstance(up, Expert):
            alike = gate.rows == up.rows and gate.transposed == up.transposed and gate.ids == up.ids
            if alike and (gate.bias is None) == (up.bias is None):
                return [gate, up], False
        raise self._not(
            "raise.gate", "gate and up of products that differ in more than their weights", "of one product"
        )

    def _tokens(self, first: Expert) -> tuple[Tensor, bool]:
        """x, and whether it is multiplied by the weights."""
        rows = first.rows
        weigh_input = isinstance(rows, Weighted)
        if isinstance(rows, Weighted):
            if self.weights is not None:
                raise self._not("raise.weights_twice", "rows that are weighted before and after the experts", "once")
            if choices(first.ids):
                raise self._not(
                    "raise.weigh_input",
                    f"rows that are weighted before the experts, with k = {product(choices(first.ids))}",
                    "k = 1, as a token is sent once, with one weight",
                )
            rows = rows.rows
        if not isinstance(rows, Tensor):
            raise self._not(
                "raise.rows", "rows of the first product that are no tokens", "x, by the tokens of the slots"
            )
        return rows, weigh_input

    def _require_slots(
        self, second: Expert, firsts: list[Expert], x: Tensor, weights: Tensor | None, weigh_input: bool
    ) -> None:
        ids = second.ids
        if any(first.ids != ids or first.experts != second.experts for first in firsts):
            raise self._not("raise.ids", "two products with other ids or experts", "the same")
        if flat(x.dims[:-1]) != tokens(ids):
            raise self._not("raise.rows", f"{x.node.name}, whose lines are not the tokens of the slots", "x by token")
        if weights is None:
            raise self._not("raise.no_weights", "results that no routing weight is multiplied with", "weights [T, k]")
        if flat(weights.dims) != slots(ids):
            raise self._not(
                "raise.weights",
                f"weights {weights.node.name} that are not one for each slot",
                "weights [T, k] of the ids",
            )
        axes = flat(self.value.dims)
        if axes != (*tokens(ids), *feature(sizes(x.node)[-1])):
            raise self._not("raise.way_back", "a sum that is not in the order of the tokens", "[T, H], by token")
