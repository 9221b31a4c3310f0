"""``moe-lowering explain``: verdicts and the choice for a block that is described, not traced.

The same functions as in the pass judge and choose. torch_npu is taken to be there: the question is about the target.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import sympy

from moe_lowering.cli import explain_models
from moe_lowering.cli.arguments import HCCL_BUFFER_MB, WEIGHT_FORMAT, UsageError
from moe_lowering.cli.explain_arguments import TOKENS, ExplainRequest
from moe_lowering.cli.explain_models import Block
from moe_lowering.deployment import Deployment
from moe_lowering.limits import Prover
from moe_lowering.limits.examining import Finding, examine
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.calls import Call, Rules
from moe_lowering.passes.choosing import Policy, load_of, vllm_choice
from moe_lowering.passes.costs import estimate
from moe_lowering.passes.deciding import sweep
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.passes.judging import Judgement, declared_tokens, judge, judged_calls
from moe_lowering.passes.quantities import dtype_name
from moe_lowering.passes.sizing import block_sizes
from moe_lowering.passes.token_ranges import TokenRange
from moe_lowering.report.records import Sizes
from moe_lowering.vocabulary import VLLM_POLICIES


@dataclasses.dataclass(frozen=True)
class Answer:
    """Verdicts and the choice at one token count.

    Attributes:
        costs: estimated microseconds by implementation, legal or not.
        wanted: what ``--comm`` asks for, or the policy's rule selects by itself; None for ``auto``.
    """

    tokens: int
    spec: BlockSpec
    deployment: Deployment
    judgement: Judgement
    choice: str | None
    reason: str
    costs: dict[str, float]
    wanted: str | None

    def findings(self, implementation: str) -> list[Finding]:
        """Every rule that applies to an implementation, with its value and whether it holds."""
        found: list[Finding] = []
        for call in self.calls(implementation):
            found += examine(
                call.operator,
                self.deployment.soc,
                self.judgement.quantities(call, self.deployment),
                self.judgement.prover,
                self.deployment.versions,
            )
        return found

    def calls(self, implementation: str) -> tuple[Call | Rules, ...]:
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

    def broken(self, implementation: str) -> dict[str, Finding]:
        """The first broken rule of each code."""
        return {f.limit.code: f for f in reversed(self.findings(implementation)) if not f.holds}


@dataclasses.dataclass(frozen=True)
class Question:
    """A block in a deployment. With equal token counts T is given; else it is the bound that the deployment declares."""

    block: Block
    deployment: Deployment
    policy: Policy
    quantisation: str

    def at(self, tokens: int) -> Answer:
        """The answer for T, or for the declared bound."""
        deployment = self.deployment
        if not deployment.equal_tokens:
            deployment = deployment.replace(max_tokens=tokens)
        spec = explain_models.spec_of(self.block, deployment, tokens, self.quantisation)
        judged: Any = tokens if deployment.equal_tokens else declared_tokens(deployment)
        judgement = judge(spec, deployment, judged, Prover(), torch_npu=True)
        choice, reason = self.policy.choose(judgement.verdicts, spec, deployment, tokens)
        load = load_of(spec, deployment, tokens)
        costs = {name: estimate(name, load) for name in IMPLEMENTATIONS}
        wanted = self._wanted(spec, deployment, tokens)
        return Answer(tokens, spec, deployment, judgement, choice, reason, costs, wanted)

    def _wanted(self, spec: BlockSpec, deployment: Deployment, tokens: int) -> str | None:
        if self.policy.comm != "auto":
            return self.policy.comm
        name = self.policy.name
        return vllm_choice(name, spec, deployment, tokens)[0] if name in VLLM_POLICIES else None


@dataclasses.dataclass(frozen=True)
class Piece:
    """A range of T with one choice.

    Attributes:
        boundary: what ends it: codes of limits, or ``cost`` or the policy's name; empty at the end of the sweep.
        because: the same in words, with sizes as expressions in T.
    """

    low: int
    high: int
    choice: str | None
    boundary: tuple[str, ...] = ()
    because: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What an ``explain`` command found."""

    request: ExplainRequest
    question: Question
    answer: Answer
    assumptions: tuple[str, ...]
    pieces: tuple[Piece, ...] | None

    def problems(self) -> list[str]:
        """Why the exit code is 1; empty when it is 0."""
        return [] if self.answer.choice is not None else [self.answer.reason]

    def to_text(self) -> str:
        """The report for a person."""
        from moe_lowering.cli.explain_text import render

        return render(self, colour=_colour(self.request.color))

    def to_json(self) -> str:
        """One JSON object."""
        answer = self.answer
        fields: dict[str, Any] = {
            "model": self.question.block.model,
            "block": _block_json(answer.spec),
            "deployment": answer.deployment.invariant_fields() | {"providers": dict(answer.deployment.providers)},
            "policy": {"name": self.request.chooses_by, "selects": answer.wanted},
            "assumptions": list(self.assumptions),
            "choice": answer.choice,
            "reason": answer.reason,
            "sizes": None if (sizes := answer.sizes()) is None else sizes.to_json(),
            "verdicts": {
                name: {
                    "legal": verdict.legal,
                    "form": verdict.form,
                    "cost_us": round(answer.costs[name], 1),
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
        if self.request.why is not None:
            fields["why"] = _why_json(answer, self.request.why)
        return json.dumps(fields, indent=2, allow_nan=False)


def explain(request: ExplainRequest) -> Explanation:
    """Carry out a command.

    Raises:
        UsageError: the block or the deployment is not possible.
    """
    block = explain_models.describe(request)
    try:
        deployment = _deployment(request, block)
    except ValueError as error:  # its own words name the field, the value and what is accepted
        raise UsageError(str(error).removeprefix("Deployment: ")) from error
    policy = Policy(request.comm, request.policy)
    question = Question(block, deployment, policy, request.quant)
    equal = not request.unequal_tokens
    tokens = request.tokens if request.tokens is not None else TOKENS
    answer = question.at(tokens if equal else request.max_tokens)
    pieces = None if request.sweep is None else _sweep(question, TokenRange(*request.sweep))
    return Explanation(request, question, answer, _assumptions(request, block, answer), pieces)


def _deployment(request: ExplainRequest, block: Block) -> Deployment:
    if block.experts % request.ep:
        raise UsageError(
            f"argument --ep: is {request.ep}; accepted: a divisor of the number of experts, {block.experts}"
        )
    if request.ep % request.tp:
        raise UsageError(f"argument --tp: is {request.tp}; accepted: a divisor of --ep, {request.ep}")
    if request.unequal_tokens and not request.max_tokens:
        raise UsageError("argument --max-tokens: is not given, and --unequal-tokens needs it; accepted: 1 or more")
    if request.unequal_tokens and not 1 <= (request.tokens or 1) <= request.max_tokens:
        raise UsageError(f"argument --tokens: is {request.tokens}; accepted: 1 to --max-tokens, {request.max_tokens}")
    if request.unequal_tokens and request.sweep and request.sweep[0] < 1:
        raise UsageError("argument --sweep: starts at 0; accepted with --unequal-tokens: a bound of 1 or more")
    return Deployment(
        soc=request.soc,
        ep_size=request.ep,
        ep_group="ep" if request.ep > 1 else "",
        mc2_group="mc2",
        tp_size=request.tp,
        tp_group="tp" if request.tp > 1 else "",
        max_tokens=request.max_tokens,
        equal_tokens=not request.unequal_tokens,
        hccl_buffer_mb=request.buffer_mb or HCCL_BUFFER_MB,
        weight_format=request.weight_format or WEIGHT_FORMAT,
        cann=request.cann or "",
        fused_mode=request.fused_mode,
        capture=request.capture,
        mc2_hierarchy=request.hierarchy,
        providers=request.providers,
    )


def _assumptions(request: ExplainRequest, block: Block, answer: Answer) -> tuple[str, ...]:
    """What the command did not say, and was taken to be so."""
    found = list(block.assumptions)
    if request.buffer_mb is None:
        found.append(f"HCCL_BUFFSIZE is {HCCL_BUFFER_MB} MB (CANN's own default is 200)")
    if request.weight_format is None:
        found.append(f"the expert weights are in format {WEIGHT_FORMAT}")
    if request.provider is None:
        found += [f"{name} {version} is installed" for name, version in request.providers]
    if not request.cann:
        found.append("the CANN version is not known: rules for any version apply")
    if not request.unequal_tokens:
        found.append("T is equal on all ranks")
    found.append("torch_npu is installed, and MC2 has a communicator of its own")
    found.append("the expert weights are stacked and laid out by shard_experts; there is no token mask")
    if block.model is not None:
        found.append(f"the pass recognises the blocks of {block.model} (`moe-lowering lower` shows it)")
    if request.quant != "none":
        found.append("the experts are quantised as moe_lowering.quantise_experts does it")
    return tuple(found)


def _sweep(question: Question, whole: TokenRange) -> tuple[Piece, ...]:
    """The pieces of a range, each with what ends it."""
    at = functools.cache(question.at)
    parts = _parts(at, whole)
    pieces = []
    for (low, choice), (following, _) in itertools.pairwise([*parts, ((whole.high or 0) + 1, None)]):
        high = following - 1
        ends = _boundary(question.policy.name, at(high), at(following)) if high != whole.high else {}
        pieces.append(Piece(low, high, choice, tuple(ends), tuple(ends.values())))
    return tuple(pieces)


def _parts(at: Callable[[int], Answer], whole: TokenRange) -> list[tuple[int, str | None]]:
    """(first T, choice) of every piece.

    ``sweep`` steps in doubling strides, so it may step over a short piece between two equal ones. An implementation does
    not become illegal and legal again as T grows: first the ranges of equal legality, then the choices within each.
    """

    def legal(tokens: int) -> str:
        return " ".join(name for name, verdict in at(tokens).judgement.verdicts.items() if verdict.legal)

    parts: list[tuple[int, str | None]] = []
    for part, _ in sweep(legal, whole):
        for piece, choice in sweep(lambda tokens: at(tokens).choice, part):
            if not parts or parts[-1][1] != choice:
                parts.append((piece.low, choice))
    return parts


def _boundary(policy: str, before: Answer, after: Answer) -> dict[str, str]:
    """What changes the choice between two neighbouring token counts, by code, in words."""
    if before.choice is not None and (broken := after.broken(before.choice)):
        return {code: _in_tokens(finding, after, before.choice) for code, finding in broken.items()}
    if after.choice is not None and (broken := before.broken(after.choice)):
        return {
            code: f"{_in_tokens(finding, before, after.choice)}; it is from here on" for code, finding in broken.items()
        }
    if before.wanted != after.wanted:
        return {policy: f"it selects {before.wanted}, then {after.wanted}"}
    return {"cost": f"{_costs(before, after)} at {before.tokens}, {_costs(after, before)} at {after.tokens} tokens"}


def _costs(answer: Answer, other: Answer) -> str:
    """The estimated cost of an answer's choice and of the other's, the choice first."""
    names = [name for name in (answer.choice, other.choice) if name is not None]
    return " < ".join(f"{name} {answer.costs[name]:.2f} us" for name in names)


def _in_tokens(finding: Finding, answer: Answer, implementation: str) -> str:
    """A rule on a size as an expression in T, e.g. ``58720256*T must be at most ...``."""
    limit, spec = finding.limit, answer.spec
    given = answer.quantities(implementation, limit.operator)
    whole = sympy.Symbol("T", integer=True, positive=True)
    share = whole if spec.tp_size == 1 else sympy.Symbol(f"ceil(T/{spec.tp_size})", integer=True, positive=True)
    received = spec.ep_size * share * min(spec.top_k, spec.local_experts)
    sizes = {
        **given, "block_tokens": whole, "tokens": share, "max_tokens": share, "received": received,
        "soc": answer.deployment.soc,
    }  # fmt: skip
    shown = str(sympy.expand(limit.value(sizes)))
    return f"{shown} must be {'' if limit.accepted(given)[0].isalpha() else 'in '}{limit.accepted(given)}"


def _block_json(spec: BlockSpec) -> dict[str, Any]:
    names = ("hidden", "intermediate", "experts", "local_experts", "top_k", "activation", "interleaved", "has_bias")
    fields = {name: getattr(spec, name) for name in (*names, "quantisation", "tokens")}
    return {**fields, "dtype": dtype_name(spec.dtype)}


def _why_json(answer: Answer, name: str) -> dict[str, Any]:
    rules = [
        {
            "code": finding.limit.code,
            "operator": finding.limit.operator,
            "holds": finding.holds,
            "expression": finding.limit.value.text,
            "value": str(finding.value),
            "limit": finding.accepted,
            "source": finding.limit.source,
            "sources": [dataclasses.asdict(source) for source in finding.limit.sources],
        }
        for finding in answer.findings(name)
    ]
    return {"implementation": name, "legal": answer.judgement.verdicts[name].legal, "rules": rules}


def _colour(asked: str) -> bool:
    """Whether to colour the report; ``NO_COLOR`` (no-color.org) turns ``auto`` off."""
    return asked == "always" or (asked == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
