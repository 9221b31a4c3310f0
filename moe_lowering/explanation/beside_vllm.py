"""What vllm-ascend's rule would have selected in place of the cheapest, and why the two differ."""

from __future__ import annotations

import dataclasses
from typing import Any

from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.costs.price import Price, difference_error, is_tie
from moe_lowering.passes.policy import vllm_choice
from moe_lowering.report.records import Verdict

RULE = "vllm_ascend_main"
TERMS_SHOWN = 2


@dataclasses.dataclass(frozen=True)
class BesideRule:
    """The selection of vllm-ascend's rule beside a choice.

    Attributes:
        selects: an implementation; None where the rule refuses the deployment.
        differs: whether it is another one than was chosen. why: in words; "" where they are the same.
    """

    selects: str | None
    differs: bool
    why: str

    def to_json(self) -> dict[str, Any]:
        return {"rule": RULE, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        if self.selects is None:
            return f"{RULE} selects nothing: {self.why}"
        return f"{RULE} selects {self.selects}, {f'which is not taken: {self.why}' if self.why else 'too'}"


def beside_rule(
    choice: str | None,
    prices: dict[str, Price | None],
    verdicts: dict[str, Verdict],
    spec: BlockSpec,
    deployment: Deployment,
    tokens: int,
) -> BesideRule:
    """Of a choice at T = ``tokens``."""
    selects, refused = vllm_choice(RULE, spec, deployment, tokens)
    if selects is None:
        return BesideRule(None, choice is not None, refused)
    if selects == choice:
        return BesideRule(selects, False, "")
    if not verdicts[selects].legal:
        codes = ", ".join(dict.fromkeys(f"[{violation.code}]" for violation in verdicts[selects].violations))
        return BesideRule(selects, True, f"it is not legal here: {codes}")
    return BesideRule(selects, True, _compared(selects, choice, prices))


def _compared(selects: str, choice: str | None, prices: dict[str, Price | None]) -> str:
    other, chosen = prices.get(selects), prices.get(choice or "")
    if other is None or chosen is None:
        return "prices are not known"
    error, more = difference_error(other, chosen) / 1000, other.us - chosen.us
    if is_tie(other, chosen):
        return f"its {other.us:.0f} us and {choice}'s {chosen.us:.0f} us are a tie, and {choice} is the simpler one"
    ours, theirs = ({what: ns / 1000 for what, ns, _ in price.terms} for price in (chosen, other))
    moved = {what: theirs.get(what, 0.0) - ours.get(what, 0.0) for what in [*theirs, *ours]}
    first = sorted(moved, key=lambda what: (-abs(moved[what]), what))[:TERMS_SHOWN]
    terms = ", ".join(f"{what} {theirs.get(what, 0.0):.0f} us against {ours.get(what, 0.0):.0f}" for what in first)
    return f"it is {more:.0f} +- {error:.0f} us {'dearer' if more > 0 else 'cheaper'} than {choice}: {terms}"
