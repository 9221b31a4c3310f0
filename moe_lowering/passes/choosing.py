"""Choose: one legal implementation by policy. It sees verdicts only, so it is the same on every rank.

``auto`` prefers the implementation with the fewest launches that is legal: the fused operator, then MC2, then AllGather.
A name instead of ``auto`` asks for that implementation and takes no other.
"""

from __future__ import annotations

from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.passes.judging import Judgement

PREFERENCE = ("fused_mc2", "mc2", "allgather")
POLICIES = ("auto", *IMPLEMENTATIONS)


def choose(judgement: Judgement, comm: str) -> tuple[str | None, str]:
    """(implementation or None, why)."""
    if comm != "auto":
        verdict = judgement.verdicts[comm]
        if verdict.legal:
            return comm, f"{comm} was asked for and is legal"
        codes = ", ".join(v.code for v in verdict.violations)
        return None, f"{comm} was asked for and is not legal: {codes}"
    for name in PREFERENCE:
        if judgement.verdicts[name].legal:
            return name, f"first legal of {', '.join(PREFERENCE)}"
    return None, "no implementation is legal"
