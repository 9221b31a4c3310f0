"""``tabulate``: which implementation is chosen for a block in many deployments, as rows of one table.

Each row is a deployment and a range of T (tokens of a rank) with one choice. Its figures are those at the most tokens
of the range, where buffers and HCCL windows are largest. ``choices_around`` makes the rows around one deployment, for a
picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from moe_lowering.explanation.answer import Answer, Question
from moe_lowering.explanation.candidate_changes import Change
from moe_lowering.explanation.memory import Memory
from moe_lowering.explanation.single_changes import single_changes
from moe_lowering.explanation.sweep import Piece, find_pieces
from moe_lowering.limits import TokenRange
from moe_lowering.report.block_costs import BlockCost

NOT_CHEAPEST = "cost"  # why a legal implementation is not chosen
POLICY = "policy"  # the same where a rule by name chose


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        soc, ep, tp, quantisation: of the deployment and the experts.
        piece: the range of T, the choice (None where none is legal), and what ends the range.
        cost: of the choice at the end of the range; None without one.
        others: by implementation that is not chosen, the codes of the rules that it breaks, or ``cost``, or ``policy``.
        changes: by implementation that is refused, which one change would make it legal.
        buffer_mb: the HCCL_BUFFSIZE that would be enough for the choice; None where it has no window of its own to fill.
    """

    soc: str
    ep: int
    tp: int
    quantisation: str
    piece: Piece
    cost: BlockCost | None
    memory: Memory
    others: dict[str, tuple[str, ...]]
    changes: dict[str, tuple[Change, ...]]
    buffer_mb: int | None

    @property
    def choice(self) -> str | None:
        return self.piece.choice

    @property
    def buffer_needed(self) -> str:
        """The HCCL_BUFFSIZE for the choice, in words."""
        if self.buffer_mb is not None:
            return f"{self.buffer_mb} MB or more"
        return "any" if self.memory.communicators else "not used"

    def to_json(self) -> dict[str, Any]:
        return {
            "soc": self.soc,
            "ep": self.ep,
            "tp": self.tp,
            "quantisation": self.quantisation,
            "from": self.piece.low,
            "to": self.piece.high,
            "choice": self.choice,
            "boundary": list(self.piece.boundary),
            "because": list(self.piece.because),
            "cost": None if self.cost is None else self.cost.to_json(),
            "memory": self.memory.to_json(),
            "others": {name: list(codes) for name, codes in self.others.items()},
            "changes": {name: [change.to_json() for change in changes] for name, changes in self.changes.items()},
            "hccl_buffer_mb": self.buffer_mb,
        }


PICTURED_TOKENS, PICTURED_RANKS = 4096, 128


def choices_around(question: Question, tokens: int, more: TokenRange | None = None) -> tuple[Row, ...]:
    """The rows of a picture around one deployment: T from 1 to 4096 or beyond ``tokens``, its EP size and powers of two.

    Args:
        more: a range of T in place of that.
    """
    deployment, experts = question.deployment, question.block.experts
    powers = {2**n for n in range(1, PICTURED_RANKS.bit_length()) if 2**n <= PICTURED_RANKS}
    # A deployment with shared-expert ranks has no other size that is like it
    sizes = {deployment.ep_size} if deployment.shared_expert_ranks else {deployment.ep_size, *powers}
    sizes = {
        size
        for size in sizes
        if experts % (size - deployment.shared_expert_ranks) == 0 and size % deployment.tp_size == 0
    }
    questions = [
        dataclasses.replace(question, deployment=deployment.replace(ep_size=size, ep_group="ep" if size > 1 else ""))
        for size in sorted(sizes)
    ]
    least = 1 if deployment.equal_tokens else max(1, deployment.min_tokens)
    return tabulate(questions, [more or TokenRange(least, max(PICTURED_TOKENS, 2 * tokens))])


def tabulate(questions: Iterable[Question], counts: Sequence[TokenRange]) -> tuple[Row, ...]:
    """The rows of some questions, in their order.

    Args:
        counts: ranges of T, or of the bound that is declared; those with one number are one row each.
    """
    rows = []
    for question in questions:
        for whole in counts:
            rows += [_row(question, piece) for piece in find_pieces(question, whole)]
    return tuple(rows)


def _row(question: Question, piece: Piece) -> Row:
    answer, deployment = question.at(piece.high), question.deployment
    cost = next((cost for cost in answer.costs() if cost.implementation == answer.choice), None)
    return Row(
        deployment.soc,
        deployment.ep_size,
        deployment.tp_size,
        question.block.quantisation,
        piece,
        cost,
        answer.memory(question.block.layers),
        _others(answer),
        single_changes(question, answer),
        answer.least_buffer_mb(),
    )


def _others(answer: Answer) -> dict[str, tuple[str, ...]]:
    """Why each implementation but the choice is not it."""
    others = {}
    for name, verdict in answer.judgement.verdicts.items():
        if name != answer.choice:
            legal = (POLICY,) if answer.requested is not None else (NOT_CHEAPEST,)
            others[name] = legal if verdict.legal else tuple(dict.fromkeys(v.code for v in verdict.violations))
    return others
