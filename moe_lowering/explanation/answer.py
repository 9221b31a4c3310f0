"""The answer for a described block at one token count: verdicts and the choice, by the same functions as in the pass.

``Question`` holds the block and the deployment; ``Question.at(T)`` makes an ``Answer``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from moe_lowering.deployment import Deployment
from moe_lowering.explanation.beside_vllm import BesideRule, beside_rule
from moe_lowering.explanation.description import BlockDescription
from moe_lowering.explanation.memory import Memory, memory_of
from moe_lowering.explanation.spec import block_spec
from moe_lowering.limits import Prover
from moe_lowering.limits.findings import Finding, examine
from moe_lowering.limits.wording import to_json
from moe_lowering.passes.block_sizes import block_sizes
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.costs.count_blocks import costs_later, legal_forms
from moe_lowering.passes.costs.price import Price, price_of
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.passes.legality import Judgement, declared_tokens, judge, judged_calls
from moe_lowering.passes.operator_calls import OperatorCall, Rules
from moe_lowering.passes.policy import Policy, rates_in, vllm_choice
from moe_lowering.report.block_costs import BlockCost
from moe_lowering.report.records import Verdict
from moe_lowering.report.sizes import Sizes
from moe_lowering.vocabulary import AUTO, VLLM_POLICIES


@dataclasses.dataclass(frozen=True, repr=False)
class Answer:
    """Verdicts and the choice at one token count.

    Attributes:
        tokens: T, or the bound that the deployment declares.
        judgement: the verdict of each implementation, and what it was judged with.
        choice: the implementation; None when none may be chosen. ``reason``: why.
        prices: by implementation; of one that is refused what it would cost, None where that cannot be told.
        requested: what ``comm`` asks for, or the policy's rule selects by itself; None for ``auto``.
    """

    tokens: int
    spec: BlockSpec
    deployment: Deployment
    judgement: Judgement
    choice: str | None
    reason: str
    prices: dict[str, Price | None]
    requested: str | None

    def __repr__(self) -> str:
        return f"<Answer: {self.summary}>"

    @property
    def summary(self) -> str:
        """T, the choice and what else is legal, in a few words."""
        legal = [name for name, verdict in self.judgement.verdicts.items() if verdict.legal and name != self.choice]
        also = f"; also legal: {', '.join(legal)}" if legal else ""
        return f"T {self.tokens}: {self.choice or 'NONE'}{also}"

    def findings(self, implementation: str) -> list[Finding]:
        """Every rule that applies to an implementation, with its value and whether it holds."""
        findings: list[Finding] = []
        for call in self.calls(implementation):
            findings += examine(
                call.operator,
                self.deployment.soc,
                self.judgement.quantities(call, self.deployment),
                self.judgement.prover,
                self.deployment.versions,
            )
        return findings

    def calls(self, implementation: str) -> tuple[OperatorCall | Rules, ...]:
        """The calls that an implementation would make, in the form that its verdict is about."""
        form = IMPLEMENTATIONS[implementation].form(self.judgement.form(implementation), self.deployment)
        return judged_calls(implementation, form, self.spec, self.deployment)

    def quantities(self, implementation: str, operator: str) -> dict[str, Any]:
        """What the rules of an operator were judged with."""
        call = next(call for call in self.calls(implementation) if call.operator == operator)
        return self.judgement.quantities(call, self.deployment)

    def sizes(self) -> Sizes | None:
        """Capacity, receive bound, HCCL window and the like of what was chosen; None when nothing was."""
        if self.choice is None:
            return None
        return block_sizes(self.spec, self.deployment, self.choice, self.judgement)

    def costs(self) -> tuple[BlockCost, ...]:
        """Kernels, bytes and price of each legal implementation, the chosen one first."""
        forms = legal_forms(self.judgement, self.spec, self.deployment)
        costs = costs_later(forms, self.spec, self.deployment, self.tokens)()
        return tuple(sorted(costs, key=lambda cost: cost.implementation != self.choice))

    def beside_rule(self) -> BesideRule:
        """What vllm-ascend's newest rule selects, and why that is not the choice."""
        verdicts = self.judgement.verdicts
        return beside_rule(self.choice, self.prices, verdicts, self.spec, self.deployment, self.tokens)

    def memory(self, layers: int | None) -> Memory:
        """What ``layers`` such layers take of a rank's memory."""
        buffers, workspace = next(
            ((cost.buffers, cost.workspace) for cost in self.costs() if cost.implementation == self.choice), (0, 0)
        )
        return memory_of(
            self.spec.tensors, layers, buffers, workspace, self.deployment, self.choice, self.least_buffer_mb()
        )

    def least_buffer_mb(self) -> int | None:
        """The HCCL_BUFFSIZE that is enough for the choice; None where it has no window of its own to fill."""
        sizes = self.sizes()
        windows = () if sizes is None else sizes.windows
        return max((window.needed_mb for window in windows if window.needed_mb is not None), default=None)

    def broken(self, implementation: str) -> dict[str, Finding]:
        """The first broken rule of each code."""
        return {f.limit.code: f for f in reversed(self.findings(implementation)) if not f.holds}

    def rules_json(self, implementation: str) -> dict[str, Any]:
        """``findings`` for JSON."""
        rules = [
            {
                "code": finding.limit.code,
                "operator": finding.limit.operator,
                "holds": finding.holds,
                "expression": finding.limit.value.text,
                "value": to_json(finding.value),
                "limit": finding.accepted.to_json(),
                "accepted": finding.accepted.say(),
                "source": finding.limit.source,
                "sources": [dataclasses.asdict(source) for source in finding.limit.sources],
            }
            for finding in self.findings(implementation)
        ]
        legal = self.judgement.verdicts[implementation].legal
        return {"implementation": implementation, "legal": legal, "rules": rules}


@dataclasses.dataclass(frozen=True)
class Question:
    """A block in a deployment. With equal token counts T is given; else it is the bound that the deployment declares."""

    block: BlockDescription
    deployment: Deployment
    policy: Policy

    def at(self, tokens: int) -> Answer:
        """The answer for T, or for the declared bound. torch_npu is taken to be there: the question is about the target."""
        deployment = self.deployment
        if not deployment.equal_tokens:
            deployment = deployment.replace(max_tokens=tokens)
        spec = block_spec(self.block, deployment, tokens)
        judged: Any = tokens if deployment.equal_tokens else declared_tokens(deployment)
        judgement = judge(spec, deployment, judged, Prover(), torch_npu=True)
        choice, reason = self.policy.choose(judgement.verdicts, spec, deployment, tokens)
        prices = {name: _price(name, verdict, spec, deployment, tokens) for name, verdict in judgement.verdicts.items()}
        requested = self._requested(spec, deployment, tokens)
        return Answer(tokens, spec, deployment, judgement, choice, reason, prices, requested)

    def _requested(self, spec: BlockSpec, deployment: Deployment, tokens: int) -> str | None:
        if self.policy.comm != AUTO:
            return self.policy.comm
        name = self.policy.name
        return vllm_choice(name, spec, deployment, tokens)[0] if name in VLLM_POLICIES else None


def _price(name: str, verdict: Verdict, spec: BlockSpec, deployment: Deployment, tokens: int) -> Price | None:
    """The price of an implementation in the form that its verdict is about."""
    try:
        return price_of(name, verdict.form, spec, deployment, tokens, rates_in(deployment))
    except Exception:  # a block that is refused may be anything: what cannot be written down has no price
        if verdict.legal:
            raise
        return None
