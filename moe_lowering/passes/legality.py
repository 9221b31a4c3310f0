"""``judge``: whether a block is legal for each implementation in this deployment, with every rule that is broken.

A verdict depends on the block's record, the deployment's rank-invariant fields and the limit tables, and on nothing
else. T enters only when the deployment declares it equal on all ranks; otherwise the rules see the declared range, so
that a rank with one token and a rank with 512 reach the same verdict (two ranks that choose differently hang). What this
rank alone breaks, such as a T outside of the declared range, is not part of a verdict: ``refusal`` returns it, and the
rank's graph then refuses to run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch
from torch.utils._sympy.value_ranges import ValueRanges

from moe_lowering.deployment import Deployment
from moe_lowering.limits import Prover, TokenRange, Violation, check
from moe_lowering.limits.calls.schemas import loaded_libraries
from moe_lowering.limits.wording import Wording, make_wording
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.context import call_context, judged_quantities
from moe_lowering.passes.implementations import IMPLEMENTATIONS, Form
from moe_lowering.passes.implementations.mlp import mlp_words
from moe_lowering.passes.operator_calls import OperatorCall, Premises, Rules
from moe_lowering.passes.quantities import deployment_rules, strict_share_of_one
from moe_lowering.report.records import Verdict
from moe_lowering.vocabulary import EXPERT_FORMATS

_T = sympy.Symbol("T", integer=True)
# Quantities of the rules that tell where an implementation exists at all: on which SoC, and on how many ranks.
_WHERE = ("soc", "ep_size")


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Verdicts of all implementations for one block, and what they were reached with.

    Attributes:
        verdicts: by implementation name.
        premises: T as the rules saw it, and what was taken to be known of it.
        context: what rules of calls read and no call shows.
    """

    verdicts: dict[str, Verdict]
    premises: Premises
    context: dict[str, Any]

    @property
    def tokens(self) -> Any:
        return self.premises.tokens

    @property
    def prover(self) -> Prover:
        return self.premises.prover

    def form(self, implementation: str) -> str:
        """The form of an implementation that its verdict is about."""
        return self.verdicts[implementation].form

    def quantities(self, call: OperatorCall | Rules, deployment: Deployment) -> dict[str, Any]:
        """What the rules of a call were judged with."""
        return _read(call, self.premises, deployment, self.context)


def _read(
    call: OperatorCall | Rules, premises: Premises, deployment: Deployment, context: dict[str, Any]
) -> dict[str, Any]:
    if isinstance(call, Rules):
        return call.read(premises)
    return judged_quantities(call, premises, deployment, context)


def torch_npu_is_loaded() -> bool:
    """Whether torch_npu's operators are registered."""
    return hasattr(torch.ops.npu, "npu_grouped_matmul")


def declared_tokens(deployment: Deployment) -> Any:
    """A size with the range that the deployment declares for every rank."""
    return free_tokens(deployment.min_tokens, deployment.max_tokens)


def free_tokens(low: int, high: int) -> Any:
    """A symbolic size called T with the range ``low`` to ``high``, in a ShapeEnv of its own, so that no other fact
    about it is known.

    The symbol is named T and not by ``create_symbol`` (``s47``), because its name reaches the user in messages.
    """
    from torch._dynamo.source import ConstantSource  # slow to import, and rarely needed
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    env, source, hint = ShapeEnv(), ConstantSource("T"), max(low, min(high, 2))
    env.var_to_range[_T] = ValueRanges(sympy.Integer(low), sympy.Integer(high))
    env.var_to_sources[_T] = [source]
    return env.create_symintnode(_T, hint=hint, source=source)


def outside_declared_range(tokens: Any, deployment: Deployment) -> bool:
    """With unequal token counts: whether this rank's T, whatever value it takes, breaks what the deployment declares."""
    if deployment.equal_tokens:
        return False
    low, high = Prover().bounds(tokens)
    return (low or 0) > deployment.max_tokens or (high is not None and high < deployment.min_tokens)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a graph of this rank must not run beside ranks that lowered the same block.

    ``accepted`` are the T that it may still take, None for none.
    """

    reason: Wording
    accepted: TokenRange | None = None


def refusal(spec: BlockSpec, deployment: Deployment) -> Refusal | None:
    """Why this rank's graph must not run although the others lower the block: its own token counts where they
    may differ, its own kind of rank, a place in its groups that is not known.

    The decision itself must not depend on it. The others communicate as declared, so this graph must not run at all.
    """
    if deployment.unknown_rank:
        return Refusal(make_wording("[deployment.rank] {why}: the graph refuses to run", why=deployment.unknown_rank))
    if spec.on_shared_rank != deployment.on_shared_rank:
        kinds = {True: "a shared-expert rank", False: "a rank with routed experts"}
        return Refusal(
            make_wording(
                "the block was built for {block}, EP rank {rank} is {here}: the graph refuses to run (build or shard the "
                "model with the deployment that the pass is given)",
                block=kinds[spec.on_shared_rank],
                rank=deployment.ep_rank,
                here=kinds[deployment.on_shared_rank],
            ),
        )
    if deployment.equal_tokens:
        return None
    low, high = deployment.min_tokens, deployment.max_tokens
    if outside_declared_range(spec.tokens, deployment):
        reason = "T is {tokens} and the deployment declares {low} to {high} on every rank: the graph refuses to run"
        return Refusal(make_wording(reason, tokens=spec.tokens, low=low, high=high), TokenRange(low, high))
    if strict_share_of_one(spec.tp_size, spec.tokens):
        return Refusal(
            make_wording(
                "[block.tp_share] T may be {tp_size} or less, so that a TP rank's share of it may be 1; torch guards on that, "
                "which T forbids (mark_dynamic), and the other ranks do not know of it: the graph refuses to run (compile "
                "with more than tp_size tokens first, let the range begin above tp_size, or use dynamic=True)",
                tp_size=spec.tp_size,
            ),
        )
    return None


def judged_calls(
    implementation: str, form: Form, spec: BlockSpec, deployment: Deployment
) -> tuple[OperatorCall | Rules, ...]:
    """Everything whose rules bind a form of an implementation: the deployment, the implementation, and its calls."""
    own = IMPLEMENTATIONS[implementation].rules(spec, deployment)
    return (deployment_rules(spec, deployment), own, *form.calls(spec, deployment))


def judge(
    spec: BlockSpec, deployment: Deployment, tokens: Any, prover: Prover, torch_npu: bool | None = None
) -> Judgement:
    """The verdict of every implementation for this block.

    Args:
        tokens: T as the rules see it.
        prover: what may be taken as known of it, when it is symbolic.
        torch_npu: whether torch_npu's operators are there; None to look in this process.
    """
    verdicts = Verdicts(spec, deployment, tokens, prover, torch_npu)
    return Judgement(dict(verdicts), verdicts.premises, verdicts.context)


class Verdicts(Mapping[str, Verdict]):
    """Verdicts by implementation as ``judge`` gives them, each worked out when it is asked for: a search over T reads one of
    them at every T where the implementation is fixed."""

    def __init__(
        self, spec: BlockSpec, deployment: Deployment, tokens: Any, prover: Prover, torch_npu: bool | None = None
    ) -> None:
        loaded = torch_npu_is_loaded() if torch_npu is None else torch_npu
        self.premises = Premises(tokens, spec.tokens, prover, loaded)
        self.context = call_context(deployment, spec, self.premises)
        self._spec, self._deployment = spec, deployment
        self._verdicts: dict[str, Verdict] = {}
        self._answers = _Answers(self.premises, self.context, deployment)
        self._prepared: _Prepared | None = None
        if spec.quantisation in EXPERT_FORMATS:
            self._prepared = _prepare_calls(spec.without_tokens, deployment, loaded_libraries())

    def __getitem__(self, name: str) -> Verdict:
        if name not in self._verdicts:
            self._verdicts[name] = self._judge(name)
        return self._verdicts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(IMPLEMENTATIONS)

    def __len__(self) -> int:
        return len(IMPLEMENTATIONS)

    def _judge(self, name: str) -> Verdict:
        if self._prepared is None:  # such a block has no emitter, hence no calls
            return Verdict(name, self._answers.of(Rules("grouped_mlp", mlp_words(self._spec, self._deployment))))
        verdict = self._prepared.verdict(name, self._answers)
        return verdict if self._deployment.equal_tokens else _with_declared_range(verdict, self._deployment)


def _with_declared_range(verdict: Verdict, deployment: Deployment) -> Verdict:
    """Violations on the declared T, each with the range that was declared."""
    declared = TokenRange(deployment.min_tokens, deployment.max_tokens)
    violations = tuple(dataclasses.replace(v, declared=declared) if _depends_on_t(v) else v for v in verdict.violations)
    return dataclasses.replace(verdict, violations=violations)


def _depends_on_t(violation: Violation) -> bool:
    return isinstance(violation.value, sympy.Basic) and _T in violation.value.free_symbols


Broken = tuple[Violation, ...]


class _Answers:
    """What calls break under the same premises; forms share calls, and each is checked once."""

    def __init__(self, premises: Premises, context: dict[str, Any], deployment: Deployment) -> None:
        self._premises, self._context, self._deployment = premises, context, deployment
        self._broken: dict[OperatorCall | Rules, Broken] = {}

    def of(self, call: OperatorCall | Rules) -> Broken:
        """Every rule that a call breaks."""
        if call not in self._broken:
            where, prover = self._deployment, self._premises.prover
            read = _read(call, self._premises, where, self._context)
            self._broken[call] = tuple(check(call.operator, where.soc, read, prover, where.versions))
        return self._broken[call]


@functools.lru_cache(maxsize=64)
def _prepare_calls(spec: BlockSpec, deployment: Deployment, libraries: frozenset[str]) -> _Prepared:
    """For a block without T: many sizes are tried of one block, and many blocks are equal. A form asks itself for the
    operators that ``libraries`` are; a library may come later."""
    return _Prepared(spec, deployment)


class _Prepared:
    """The calls of every form, and the violations of those that do not read T."""

    def __init__(self, spec: BlockSpec, deployment: Deployment) -> None:
        self._spec, self._deployment = spec, deployment
        self._common = deployment_rules(spec, deployment)
        self._rules: dict[str, Rules] = {}
        self._calls: dict[tuple[str, str], tuple[OperatorCall | Rules, ...]] = {}
        self._fixed: dict[OperatorCall | Rules, Broken] = {}

    def verdict(self, name: str, answers: _Answers) -> Verdict:
        """Of the first legal form; of the preferred form when none is. With the forms that the deployment rules out, and
        those that the first legal one was preferred to for a rule that they break."""
        first: Verdict | None = None
        passed = ruled_out = tuple(
            (form.name, self._all_broken(name, self._calls_of(name, form), answers))
            for form in IMPLEMENTATIONS[name].ruled_out(self._deployment)
        )
        for form in IMPLEMENTATIONS[name].forms(self._deployment):
            calls = (self._common, self._rules_of(name), *self._calls_of(name, form))
            violations = self._all_broken(name, calls, answers)
            if not violations:
                return Verdict(name, (), form.name, passed)
            first = first or Verdict(name, violations, form.name, ruled_out)
            passed = (*passed, (form.name, violations))
        assert first is not None
        return first

    def _calls_of(self, name: str, form: Form) -> tuple[OperatorCall | Rules, ...]:
        key = name, form.name
        if key not in self._calls:
            self._calls[key] = form.calls(self._spec, self._deployment)
        return self._calls[key]

    def _rules_of(self, name: str) -> Rules:
        if name not in self._rules:
            self._rules[name] = IMPLEMENTATIONS[name].rules(self._spec, self._deployment)
        return self._rules[name]

    def _all_broken(self, name: str, calls: tuple[OperatorCall | Rules, ...], answers: _Answers) -> Broken:
        violations: list[Violation] = []
        for call in calls:
            broken = self._broken(call, answers)
            violations += broken
            if call.operator == name and any(v.quantity in _WHERE for v in broken):
                break  # its operators are not called then, so that their limits are no reason
        # first that there is no provider of the operator at all: rules for versions of one say little then
        return tuple(sorted(dict.fromkeys(violations), key=lambda violation: not violation.code.endswith(".provider")))

    def _broken(self, call: OperatorCall | Rules, answers: _Answers) -> Broken:
        if call.reads_tokens:
            return answers.of(call)
        if call not in self._fixed:
            self._fixed[call] = answers.of(call)
        return self._fixed[call]
