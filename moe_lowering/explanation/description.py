"""``BlockDescription``: the sizes and words of one MoE layer on all ranks, which ``explain`` judges in place of a graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from moe_lowering.explanation import routing_weights as routing
from moe_lowering.explanation.errors import ExplainError
from moe_lowering.model_configs.check import LARGEST
from moe_lowering.vocabulary import ACTIVATIONS, EXPERT_FORMATS, SWIGLU_ALPHA

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = ("hidden", "intermediate", "experts", "top_k")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockDescription:
    """One MoE block of a model, on all ranks.

    Attributes:
        hidden: width of a token. ``intermediate``: width of an expert's hidden layer.
        experts: routed experts on all ranks. ``top_k``: experts of one token.
        dtype: of weights and activations: float32, float16, bfloat16.
        quantisation: of the experts, as ``moe_lowering.quantise_experts`` makes them; ``none`` for those in ``dtype``.
        activation, limit, alpha, interleaved: of ``moe_experts`` (docs/architecture.md); a limit of 0 is none.
        has_bias: the experts have biases.
        weights_contiguous: they are stored as the grouped matmul reads them, K before N, as ``shard_experts`` leaves them.
        routing_weights: ``float32``, or ``activations`` for those in ``dtype`` (``explanation.routing_weights``); None where that
            is not known, which is judged as float32.
        layers: how many MoE layers the model has, for its memory; None where that is not known.
        model: the model's type, file or class; None for a block without a model.
        changes: in words, what is not as the model has it, since another size or dtype was asked for.
        assumptions: what was taken for granted, for reports.

    Raises:
        ExplainError: a field out of range, of another kind, or that does not go with another one.
    """

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    dtype: torch.dtype = torch.bfloat16
    quantisation: str = "none"
    activation: str = "swiglu"
    limit: float = 0.0
    alpha: float = SWIGLU_ALPHA
    interleaved: bool = False
    has_bias: bool = False
    weights_contiguous: bool = True
    routing_weights: str | None = None
    layers: int | None = dataclasses.field(default=None, compare=False)
    model: str | None = None
    changes: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    assumptions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in SIZES:
            _require_size(name, getattr(self, name))
        if self.layers is not None:
            _require_size("layers", self.layers)
        if self.top_k > self.experts:
            raise ExplainError("top_k", f"is {self.top_k}; accepted: 1 to the number of experts, {self.experts}")
        if self.dtype not in DTYPES:
            raise ExplainError("dtype", f"is {self.dtype!r}; accepted: {', '.join(map(str, DTYPES))}")
        for name, words in (("quantisation", EXPERT_FORMATS), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in words:
                raise ExplainError(name, f"is {getattr(self, name)!r}; accepted: {', '.join(words)}")
        if self.routing_weights not in (None, *routing.WORDS):
            raise ExplainError(
                "routing_weights", f"is {self.routing_weights!r}; accepted: {', '.join(routing.WORDS)}, or None"
            )
        for name in ("limit", "alpha"):
            _require_number(name, getattr(self, name))
        for name in ("interleaved", "has_bias", "weights_contiguous"):
            if not isinstance(getattr(self, name), bool):
                raise ExplainError(name, f"is {getattr(self, name)!r}; accepted: True or False")
        if self.has_bias and EXPERT_FORMATS[self.quantisation].quantised:
            raise ExplainError(
                "quantisation",
                f"is {self.quantisation}, and the experts of {self.model or 'the block'} have biases; accepted: none, as "
                "quantised matmuls take no biases",
            )

    @property
    def title(self) -> str:
        """The model by its name, and what was changed of it."""
        changes = f" with {', '.join(self.changes)}" if self.changes else ""
        return f"{self.model or 'MoE block'}{changes}"

    @property
    def routing_dtype(self) -> torch.dtype:
        """Of the routing weights, as far as it is known."""
        return self.dtype if self.routing_weights == routing.ACTIVATIONS else torch.float32


def describe_changes(pairs: Mapping[str, tuple[Any, Any]]) -> tuple[str, ...]:
    """In words, what differs of (as the model has it, as it was asked for) by name; what a model does not say is no change."""
    return tuple(
        f"{name} {str(asked).removeprefix('torch.')} in place of {str(own).removeprefix('torch.')}"
        for name, (own, asked) in pairs.items()
        if own and asked is not None and own != asked
    )


def _require_size(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
        raise ExplainError(name, f"is {value!r}; accepted: an integer from 1 to {LARGEST}")


def _require_number(name: str, value: Any) -> None:
    """Finite, and 0 or more: a negative limit would clamp everything away."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise ExplainError(name, f"is {value!r}; accepted: a finite number of 0 or more")
