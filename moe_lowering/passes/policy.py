"""Choose: one legal implementation by policy. What a policy sees is the same on every rank.

- ``auto``: the cheapest legal one by its price (``price``; of those that tie the simplest), or by the user's cost
  function. With ``comm``, that one and no other; but ``fused_mc2`` that lacks a provider of its operator, and breaks no
  other rule, becomes the cheapest legal one, and the reason says so.
- ``fixed``: the one that ``comm`` names and no other, whatever the reason.
- ``vllm_ascend_0_13``, ``vllm_ascend_main``: what vllm-ascend selects. Where that is not legal for the block, or
  vllm-ascend itself refuses the situation, the cheapest legal one, and the reason says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from moe_lowering.argument_checks import require_callable, require_choice
from moe_lowering.deployment import Deployment
from moe_lowering.lookup import look_up
from moe_lowering.number_words import count_of
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.costs.cost_model import Cost, Load
from moe_lowering.passes.costs.price import Price, choose_cheapest, difference_error, price_of
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.passes.implementations.tensor_parallel import tokens_per_rank
from moe_lowering.passes.vllm_ascend_rules import (
    Situation,
    capacity_0_13,
    capacity_main,
    choose_0_13,
    choose_main,
    fused_in_main,
)
from moe_lowering.prices.rates import Rates, rates_of
from moe_lowering.report.records import Verdict
from moe_lowering.vocabulary import COMMS, EXPERT_FORMATS, POLICIES, PROVIDERS, VLLM_POLICIES

_CHOOSERS = {"vllm_ascend_0_13": choose_0_13, "vllm_ascend_main": choose_main}
NO_PROVIDER = "fused.provider"  # the code of the rule that a library brings the fused operator
DEFAULT_TOKENS = 512  # what a graph without any bound is costed with: a full MC2 batch


NONE_LEGAL = "no implementation is legal"


class PolicyError(ValueError):
    """The user's cost function failed or did not give a number. The message names it, the implementation and the load."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """How to choose.

    Attributes:
        comm: ``auto``, or the name of the only implementation to use.
        name: ``auto``, ``fixed`` (with ``comm``), or one of vllm-ascend's rules (without).
        cost: the user's estimate in microseconds of an implementation under a load; None for the package's own prices.

    Raises:
        ValueError: an unknown ``comm`` or ``name``, names that do not go together, a cost that cannot be called.
    """

    comm: str = "auto"
    name: str = "auto"
    cost: Cost | None = None

    def __post_init__(self) -> None:
        require_choice("MoeLowering", "comm", self.comm, COMMS)
        require_choice("MoeLowering", "policy", self.name, POLICIES)
        if self.cost is not None:
            accepted = "a function (implementation, load) that gives microseconds, or None"
            require_callable("MoeLowering", "cost", self.cost, accepted)
        fits = look_up(
            {"auto": True, "fixed": self.comm != "auto", **dict.fromkeys(VLLM_POLICIES, self.comm == "auto")},
            self.name,
            "policy",
        )
        if not fits:
            accepted_comm = "auto" if self.comm != "auto" else ", ".join(IMPLEMENTATIONS)
            raise ValueError(f"MoeLowering: comm is {self.comm!r} with policy {self.name!r}; accepted: {accepted_comm}")

    def choose(
        self, verdicts: Mapping[str, Verdict], spec: BlockSpec, deployment: Deployment, tokens: int
    ) -> tuple[str | None, str]:
        """(implementation or None, why) at ``tokens`` tokens on a rank."""
        prefix = ""
        if self.comm != "auto":
            verdict = verdicts[self.comm]
            codes = list(dict.fromkeys(v.code for v in verdict.violations))
            if self.name == "fixed" or not _lacks_only_a_provider(verdict, deployment):
                return self._fixed(verdict.legal, codes)
            prefix = f"{self.comm} was asked for, and no provider of its operator is declared [{NO_PROVIDER}]; "
        legal = [name for name in IMPLEMENTATIONS if verdicts[name].legal]
        if self.name in VLLM_POLICIES:
            selected, refused = vllm_choice(self.name, spec, deployment, tokens)
            if selected in legal:
                return selected, f"{self.name} selects it"
            prefix = f"{refused}; " if refused else f"{self.name} selects {selected}, which is not legal here; "
        if not legal:
            return None, prefix + NONE_LEGAL
        if self.cost is None:
            forms = {name: verdicts[name].form for name in legal}
            best, why = _cheapest(forms, spec, deployment, tokens)
        else:
            best, why = self._cheapest(legal, load_of(spec, deployment, tokens), tokens)
        return best, prefix + why

    def _cheapest(self, legal: list[str], load: Load, tokens: int) -> tuple[str, str]:
        costs = {name: self._cost(name, load) for name in legal}
        best = min(legal, key=lambda name: (costs[name], name))
        at = f"at {count_of(tokens, 'token')}: {costs[best]:.0f} us"
        others = ", ".join(f"{name} {costs[name]:.0f} us" for name in legal if name != best)
        return best, f"cheapest {at} against {others}" if others else f"the only legal one, {at}"

    def _cost(self, implementation: str, load: Load) -> float:
        assert self.cost is not None
        try:
            cost = float(self.cost(implementation, load))
            if math.isnan(cost):  # compares with nothing, so that the order of names would choose
                raise ValueError("it gave nan")
            return cost
        except Exception as error:
            raise PolicyError(
                f"cost is {self.cost!r}, which failed for {implementation} under {load}: {type(error).__name__}: {error}; "
                "accepted: a function that gives microseconds"
            ) from error

    def _fixed(self, legal: bool, codes: list[str]) -> tuple[str | None, str]:
        if legal:
            return self.comm, f"{self.comm} was asked for and is legal"
        return None, f"{self.comm} was asked for and is not legal: {', '.join(f'[{code}]' for code in codes)}"


def rates_in(deployment: Deployment) -> Rates:
    """What prices in a deployment depend on."""
    assert isinstance(deployment.measured, tuple)  # read when it was made
    return rates_of(deployment.soc, deployment.ranks_per_node, deployment.measured)


def _cheapest(forms: dict[str, str], spec: BlockSpec, deployment: Deployment, tokens: int) -> tuple[str, str]:
    """The cheapest of some legal forms, by implementation, or the simplest of those that tie with it; and why."""
    if len(forms) == 1:  # nothing to compare: no price is worked out
        return next(iter(forms)), "the only legal one"
    rates = rates_in(deployment)
    prices = {name: price_of(name, form, spec, deployment, tokens, rates) for name, form in forms.items()}
    best, tied = choose_cheapest(prices, forms)
    what = "the simplest of those tied" if tied else "cheapest"
    text = f"{what} at {count_of(tokens, 'token')}: {_price_text(prices[best])}"
    if tied:
        text += f"; a tie with {_prices_text(tied, prices)}, as {_difference_text(prices[best], [prices[n] for n in tied])};"
    if others := [name for name in prices if name != best and name not in tied]:
        text += f" against {_prices_text(others, prices)}"
    return best, text.removesuffix(";")


def _prices_text(names: Iterable[str], prices: Mapping[str, Price]) -> str:
    return ", ".join(f"{name} {_price_text(prices[name])}" for name in names)


def _difference_text(best: Price, tied: Sequence[Price]) -> str:
    """Why prices are a tie; of two in numbers, as what stands behind each is larger than the error of their difference."""
    if len(tied) > 1:
        return "the differences are within their errors"
    difference, error = abs(best.us - tied[0].us), difference_error(best, tied[0]) / 1000
    return f"the difference of {difference:.0f} us may be wrong by {error:.0f} us"


def _price_text(price: Price) -> str:
    return f"{price.us:.0f} +- {price.error_us:.0f} us"


def _lacks_only_a_provider(verdict: Verdict, deployment: Deployment) -> bool:
    """Whether nothing else is wrong; rules for certain versions of a library that is not there are not yet rules."""
    others = (v for v in verdict.violations if v.code != NO_PROVIDER)
    absent = {name for name in PROVIDERS if deployment.provider(name) is None}
    return NO_PROVIDER in (v.code for v in verdict.violations) and all(absent & {*v.versions} for v in others)


def load_of(spec: BlockSpec, deployment: Deployment, tokens: int) -> Load:
    """What the cost function is asked about."""
    form = spec.format
    return Load(
        soc=deployment.soc,
        ep_size=spec.ep_size,
        tokens=tokens_per_rank(tokens, spec),
        hidden=spec.hidden,
        intermediate=spec.intermediate,
        top_k=spec.top_k,
        local_experts=spec.local_experts,
        # int8 rows travel out, results come back in the block's dtype
        width=(1 + spec.dtype.itemsize) / 2 if form.int8_rows else spec.dtype.itemsize,
        weight_width=form.bits / 8 if form.quantised else spec.dtype.itemsize,
    )


def vllm_choice(name: str, spec: BlockSpec, deployment: Deployment, tokens: int) -> tuple[str | None, str]:
    """(what vllm-ascend's rule selects for this block, or why it refuses); MC2's capacity is the deployment's, else that
    of a largest captured batch of ``max_tokens``.

    The rule's fused mode is the deployment's, as far as a library that it would call is declared.
    """
    choose = look_up(_CHOOSERS, name, "policy")
    old = choose is choose_0_13
    mega_moe = not old and deployment.provider("cann_ops_transformer") is not None
    available = mega_moe or deployment.provider("vllm_ascend") is not None
    most = deployment.max_tokens or DEFAULT_TOKENS
    situation = Situation(
        soc=deployment.soc,
        ep_size=spec.ep_size,
        tokens=tokens,
        capacity=0,
        experts=spec.experts,
        top_k=spec.top_k,
        hidden=spec.hidden,
        intermediate=spec.intermediate,
        quantisation=look_up(EXPERT_FORMATS, spec.quantisation, f"{name}: quantisation").vllm_ascend,
        fused_mode=deployment.fused_mode if available else 0,
        mega_moe=mega_moe,
    )
    if old:
        derived = capacity_0_13(spec.tp_size, most)
    else:
        derived = capacity_main(spec.tp_size, most, fused=fused_in_main(situation), mega_moe=mega_moe)
    situation = dataclasses.replace(situation, capacity=deployment.mc2_capacity or derived)
    try:
        return choose(situation), ""
    except ValueError as refused:
        return None, f"{name} refuses this deployment ({refused})"
