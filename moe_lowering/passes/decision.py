"""``decide``: verdicts and a choice for one block, for the range of token counts that its graph will serve.

- T static: judged and chosen at T.
- T not equal on all ranks: judged on the declared range, chosen at its upper end; T itself is never read.
- T symbolic, guards allowed, no strict range: the widest range around the compile's own T on which the choice is the
  same, proven for the whole range, and requested as a guard: another size recompiles and may choose otherwise.
- T symbolic otherwise: judged on the whole range, chosen at its upper end. In a strict range the notes say where another
  choice would begin, so that the user can split it.
- T symbolic with a TP group: torch's meta functions guard on whether a rank's share of T is 1, so that a graph serves one
  side of that boundary in any case. The range is cut there, as a range of T, and enforced, with forbidden guards too.

A graph whose choice depends on a range also enforces it by itself (``assert_tokens``): caches drop guards.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from moe_lowering.deployment import Deployment
from moe_lowering.limits import Prover, TokenRange
from moe_lowering.passes.block_sizes import block_sizes
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.costs.count_blocks import costs_later, legal_forms
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.passes.legality import Judgement, Verdicts, declared_tokens, free_tokens, judge
from moe_lowering.passes.policy import DEFAULT_TOKENS, Policy
from moe_lowering.passes.token_ranges import (
    RUNS_WITHOUT_GUARDS,
    SEARCH_LIMIT,
    is_strict,
    known_range,
    prover_for,
    size_hint,
    widest,
)
from moe_lowering.report.block_costs import BlockCost
from moe_lowering.report.sizes import Sizes


@dataclasses.dataclass(frozen=True)
class Decision:
    """What to do with a block.

    Attributes:
        comm: the implementation, None when the block stays as it is.
        reason: why.
        judgement: the verdicts it rests on.
        guard: range to request from dynamo; None for no guard.
        enforced: range outside of which the lowered graph must refuse to run; None when every size is fine.
        notes: what the user should know.
        sizes: for the report; None when the block stays as it is.
        count: works out what each legal implementation costs, for the report; None where none is.
    """

    comm: str | None
    reason: str
    judgement: Judgement
    guard: TokenRange | None = None
    enforced: TokenRange | None = None
    notes: tuple[str, ...] = ()
    sizes: Sizes | None = None
    count: Callable[[], tuple[BlockCost, ...]] | None = None


def decide(spec: BlockSpec, deployment: Deployment, policy: Policy) -> Decision:
    """The decision for one block; the same on every rank."""
    decision = _decide(spec, deployment, policy)
    at = _costed_tokens(spec, deployment)
    if forms := legal_forms(decision.judgement, spec, deployment):
        decision = dataclasses.replace(decision, count=costs_later(forms, spec, deployment, at))
    if decision.comm is None:
        return decision
    notes = decision.notes
    form = IMPLEMENTATIONS[decision.comm].form(decision.judgement.form(decision.comm), deployment)
    if form.note is not None:
        notes += (form.note(spec, deployment, at),)
    if spec.max_rows and not form.keeps_max_rows:
        notes += (_note_unused_cap(spec, decision.comm, form.name),)
    sizes = block_sizes(spec, deployment, decision.comm, decision.judgement)
    return dataclasses.replace(decision, notes=notes, sizes=sizes)


def _costed_tokens(spec: BlockSpec, deployment: Deployment) -> int:
    """T for figures in the report: what the graph has, else the declared bound."""
    fixed = isinstance(spec.tokens, int) and deployment.equal_tokens
    return int(spec.tokens) if fixed else deployment.max_tokens or DEFAULT_TOKENS


def _note_unused_cap(spec: BlockSpec, comm: str, form: str) -> str:
    name = comm if form == comm else f"{comm} ({form})"
    return (
        f"max_rows = {spec.max_rows} bounds the generic operators and AllToAll by rows only: {name} has room for every row "
        "that can arrive, so that no row is dropped"
    )


def _decide(spec: BlockSpec, deployment: Deployment, policy: Policy) -> Decision:
    if not deployment.equal_tokens:
        return _decide_unequal(spec, deployment, policy)
    if isinstance(spec.tokens, int):
        judgement = judge(spec, deployment, spec.tokens, Prover())
        return Decision(*policy.choose(judgement.verdicts, spec, deployment, spec.tokens), judgement)
    return _decide_symbolic(spec, deployment, policy)


def _decide_unequal(spec: BlockSpec, deployment: Deployment, policy: Policy) -> Decision:
    judgement = judge(spec, deployment, declared_tokens(deployment), Prover())
    comm, reason = policy.choose(judgement.verdicts, spec, deployment, deployment.max_tokens)
    declared = TokenRange(deployment.min_tokens, deployment.max_tokens)
    if isinstance(spec.tokens, int):
        return Decision(comm, reason, judgement, enforced=None if spec.tokens in declared else declared)
    # a guard on this rank's own T only costs another compile: the decision does not depend on it
    side = _side_of_share(spec, declared)
    guard = side if side not in (declared, known_range(spec.tokens)) and side.low != side.high else None
    return Decision(comm, reason, judgement, guard=guard, enforced=side)


def _side_of_share(spec: BlockSpec, allowed: TokenRange) -> TokenRange:
    """The T on the compile's own side of the boundary at which a TP rank's share is more than 1; all of a strict range."""
    started_at = size_hint(spec.tokens)
    if spec.tp_size == 1 or started_at is None or is_strict(spec.tokens) or RUNS_WITHOUT_GUARDS.get():
        return allowed
    if started_at <= spec.tp_size:
        side = allowed.at_most(spec.tp_size)
    else:
        side = TokenRange(max(allowed.low, spec.tp_size + 1), allowed.high)
    # This compile's T is outside of the declared range: the graph enforces the whole range
    return allowed if side.empty else side


def _decide_symbolic(spec: BlockSpec, deployment: Deployment, policy: Policy) -> Decision:
    known = known_range(spec.tokens)
    allowed = known.at_most(deployment.max_tokens) if deployment.max_tokens else known
    if allowed.empty:  # no T is within the declared bound; the verdicts give the reason
        judgement = judge(spec, deployment, spec.tokens, Prover())
        return Decision(*policy.choose(judgement.verdicts, spec, deployment, known.low), judgement)

    @functools.cache  # the searches meet at the ends of the range
    def choice_at(tokens: int) -> str | None:
        return policy.choose(Verdicts(spec, deployment, tokens, Prover()), spec, deployment, tokens)[0]

    strict = is_strict(spec.tokens)
    started_at = size_hint(spec.tokens)
    whole, allowed = allowed, _side_of_share(spec, allowed)
    interval, at = allowed, allowed.high or DEFAULT_TOKENS
    if deployment.guards == "allow" and not strict and started_at is not None and started_at in allowed:
        widest_interval = widest(choice_at, started_at, allowed)
        # One point would make a constant of T, which fails a compile that marked it dynamic
        if widest_interval.low != widest_interval.high:
            interval, at = widest_interval, started_at
    judgement = judge(spec, deployment, spec.tokens, prover_for(spec.tokens, interval))
    comm, reason = policy.choose(judgement.verdicts, spec, deployment, at)
    narrowed = interval != allowed
    return Decision(
        comm,
        f"{reason}, for {interval}" if narrowed else reason,
        judgement,
        guard=interval if interval != whole and interval.low != interval.high else None,
        enforced=interval
        if comm is not None and (interval != known or _rests_on_range(spec, deployment, comm))
        else None,
        notes=_split_note(choice_at, allowed, comm) if not narrowed else (),
    )


def _rests_on_range(spec: BlockSpec, deployment: Deployment, comm: str) -> bool:
    """Whether the implementation is legal for some T only: then the graph itself must refuse other T."""
    anything = judge(spec, deployment.replace(max_tokens=0), free_tokens(0, SEARCH_LIMIT), Prover())
    return not anything.verdicts[comm].legal


def _split_note(choice_at: Callable[[int], str | None], allowed: TokenRange, comm: str | None) -> tuple[str, ...]:
    """Where in a range that may not be narrowed other implementations would be chosen."""
    parts = sweep(choice_at, allowed)
    if all(chosen == comm for _, chosen in parts):
        return ()
    shown = ", ".join(f"{chosen or 'none'} for {part}" for part, chosen in parts)
    return (f"the range was not split; split it to get {shown}",)


def sweep(choice_at: Callable[[int], str | None], allowed: TokenRange) -> list[tuple[TokenRange, str | None]]:
    """The pieces of a range, each with its choice, in order of T."""
    parts: list[tuple[TokenRange, str | None]] = []
    rest = allowed
    while not rest.empty:
        part = widest(choice_at, rest.low, rest)
        parts.append((part, choice_at(part.low)))
        if part.high is None:
            break
        rest = TokenRange(part.high + 1, rest.high)
    return parts
