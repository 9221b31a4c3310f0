"""``Explanation``, the record that ``explain`` returns: the question, its answer, the pieces of the sweep, and its JSON."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from moe_lowering.explanation.answer import Answer, Question
from moe_lowering.explanation.candidate_changes import Change
from moe_lowering.explanation.description import BlockDescription
from moe_lowering.explanation.single_changes import single_changes
from moe_lowering.explanation.sweep import Piece
from moe_lowering.explanation.text import render
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.costs.price import Price
from moe_lowering.passes.quantities import dtype_name
from moe_lowering.report.deployment_text import deployment_json
from moe_lowering.report.schemas import SCHEMA_VERSION, json_value
from moe_lowering.vocabulary import AUTO, FIXED


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """Which implementations are legal for a block in a deployment, what is chosen, and why.

    ``str`` is the report that ``moe-lowering explain`` prints, without colours, as wide as the terminal, of 80 to 100 columns.

    Attributes:
        question: the block, the deployment and the policy.
        answer: verdicts and the choice at the number of tokens that was asked for.
        assumptions: what was taken for granted, in words.
        pieces: with ``sweep``, the ranges of T with one choice each; else None.
    """

    question: Question
    answer: Answer
    assumptions: tuple[str, ...]
    pieces: tuple[Piece, ...] | None = None

    def __str__(self) -> str:
        return render(self)

    def __repr__(self) -> str:
        deployment, model = self.answer.deployment, self.block.model or "MoE block"
        return f"<Explanation: {model} on {deployment.soc}, EP {deployment.ep_size}, {self.answer.summary}>"

    @property
    def block(self) -> BlockDescription:
        """The block that was asked about."""
        return self.question.block

    @functools.cached_property
    def changes(self) -> dict[str, tuple[Change, ...]]:
        """By implementation that is refused: which one change would make it legal, each of them tried."""
        return single_changes(self.question, self.answer)

    @property
    def chooses_by(self) -> str:
        """The policy by name: with ``comm`` it is ``fixed``."""
        return self.question.policy.name if self.question.policy.comm == AUTO else FIXED

    def to_json(self) -> dict[str, Any]:
        """Everything but single rules (``answer.rules_json``), as ``json.dumps`` takes it."""
        answer = self.answer
        fields: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "model": self.block.model,
            "block": _block_json(answer.spec),
            "deployment": deployment_json(answer.deployment),
            "policy": {"name": self.chooses_by, "selects": answer.requested},
            "changes": {name: [change.to_json() for change in found] for name, found in self.changes.items()},
            "assumptions": list(self.assumptions),
            "choice": answer.choice,
            "reason": answer.reason,
            "sizes": None if (sizes := answer.sizes()) is None else sizes.to_json(),
            "beside": answer.beside_rule().to_json(),
            "memory": answer.memory(self.block.layers).to_json(),
            "costs": [cost.to_json() for cost in answer.costs()],
            "verdicts": {
                name: {
                    "legal": verdict.legal,
                    "form": verdict.form,
                    **_price_json(answer.prices[name]),
                    "violations": [violation.to_json() for violation in verdict.violations],
                }
                for name, verdict in answer.judgement.verdicts.items()
            },
        }
        if self.pieces is not None:
            fields["sweep"] = [
                {"from": p.low, "to": p.high, "choice": p.choice, "boundary": p.boundary, "because": p.because}
                for p in self.pieces
            ]
        written: dict[str, Any] = json_value(fields)
        return written


def _price_json(price: Price | None) -> dict[str, Any]:
    if price is None:
        return {"cost_us": None, "cost_error_us": None}
    return {"cost_us": round(price.us, 1), "cost_error_us": round(price.error_us, 1)}


def _block_json(spec: BlockSpec) -> dict[str, Any]:
    names = ("hidden", "intermediate", "experts", "local_experts", "top_k", "activation", "interleaved", "has_bias")
    fields = {name: getattr(spec, name) for name in (*names, "quantisation", "tokens")}
    return {**fields, "dtype": dtype_name(spec.dtype), "routing_dtype": dtype_name(spec.routing_dtype)}
