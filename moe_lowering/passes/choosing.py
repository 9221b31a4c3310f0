"""Choose: one legal implementation by policy. What a policy sees is the same on every rank.

- ``auto``: the cheapest legal one by a cost function (``costs.estimate``, or the user's).
- a name (``allgather``, ``mc2``, ``fused_mc2``): that one and no other.
- ``vllm_ascend_0_13``, ``vllm_ascend_main``: what vllm-ascend selects. Where that is not legal for the block, the
  cheapest legal one, and the reason says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.costs import Load, estimate
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.passes.implementations.tensor_parallel import share
from moe_lowering.passes.vllm_ascend_rules import Situation, capacity_0_13, capacity_main, choose_0_13, choose_main
from moe_lowering.report.records import Verdict

Cost = Callable[[str, Load], float]
VLLM = ("vllm_ascend_0_13", "vllm_ascend_main")
COMMS = ("auto", *IMPLEMENTATIONS)
POLICIES = ("auto", *VLLM)
WEIGHT_WIDTHS = {"w8a8": 1.0, "w4a8": 0.5, "w4a16": 0.5}  # bytes
DEFAULT_TOKENS = 512  # what a graph without any bound is costed with: a full MC2 batch


class PolicyError(ValueError):
    """The user's cost function failed or did not give a number. The message names it, the implementation and the load."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """How to choose.

    Attributes:
        comm: ``auto``, or the name of the only implementation to use.
        name: ``auto`` or one of vllm-ascend's rules; read when ``comm`` is ``auto``.
        cost: estimated microseconds of an implementation under a load.

    Raises:
        ValueError: for an unknown ``comm`` or ``name``.
    """

    comm: str = "auto"
    name: str = "auto"
    cost: Cost = estimate

    def __post_init__(self) -> None:
        for field, value, accepted in (("comm", self.comm, COMMS), ("policy", self.name, POLICIES)):
            if value not in accepted:
                raise ValueError(f"MoeLowering: {field} is {value!r}; accepted: {', '.join(accepted)}")

    def choose(
        self, verdicts: dict[str, Verdict], spec: BlockSpec, deployment: Deployment, tokens: int
    ) -> tuple[str | None, str]:
        """(implementation or None, why) at ``tokens`` tokens on a rank."""
        if self.comm != "auto":
            return self._fixed(verdicts[self.comm])
        legal = [name for name in IMPLEMENTATIONS if verdicts[name].legal]
        if not legal:
            return None, "no implementation is legal"
        asked = ""
        if self.name in VLLM:
            wanted = vllm_choice(self.name, spec, deployment, tokens)
            if wanted in legal:
                return wanted, f"{self.name} selects it"
            asked = f"{self.name} selects {wanted}, which is not legal here; "
        costs = {name: self._cost(name, load_of(spec, deployment, tokens)) for name in legal}
        best = min(legal, key=lambda name: (costs[name], name))
        others = ", ".join(f"{name} {costs[name]:.0f} us" for name in legal if name != best)
        against = f" against {others}" if others else ", the only legal one"
        return best, f"{asked}cheapest at {tokens} tokens: {costs[best]:.0f} us{against}"

    def _cost(self, implementation: str, load: Load) -> float:
        try:
            return float(self.cost(implementation, load))
        except Exception as error:
            raise PolicyError(
                f"cost is {self.cost!r}, which failed for {implementation} under {load}: {type(error).__name__}: {error}; "
                "accepted: a function that gives microseconds"
            ) from error

    def _fixed(self, verdict: Verdict) -> tuple[str | None, str]:
        if verdict.legal:
            return self.comm, f"{self.comm} was asked for and is legal"
        codes = ", ".join(dict.fromkeys(v.code for v in verdict.violations))
        return None, f"{self.comm} was asked for and is not legal: {codes}"


def load_of(spec: BlockSpec, deployment: Deployment, tokens: int) -> Load:
    """What the cost function is asked about."""
    return Load(
        soc=deployment.soc,
        ep_size=spec.ep_size,
        tokens=share(tokens, spec),
        hidden=spec.hidden,
        intermediate=spec.intermediate,
        top_k=spec.top_k,
        local_experts=spec.local_experts,
        # int8 rows travel out, results come back in the block's dtype
        width=(1 + spec.dtype.itemsize) / 2 if spec.quantisation in ("w8a8", "w4a8") else spec.dtype.itemsize,
        weight_width=WEIGHT_WIDTHS.get(spec.quantisation, spec.dtype.itemsize),
    )


def vllm_choice(name: str, spec: BlockSpec, deployment: Deployment, tokens: int) -> str:
    """What vllm-ascend's rule selects for this block; MC2's capacity comes from ``Deployment.max_tokens``."""
    fused = deployment.provider("vllm_ascend") is not None
    most = deployment.max_tokens or DEFAULT_TOKENS
    mega_moe = deployment.provider("cann_ops_transformer") is not None
    old = name == "vllm_ascend_0_13"
    situation = Situation(
        soc=deployment.soc,
        ep_size=spec.ep_size,
        tokens=tokens,
        capacity=(
            capacity_0_13(spec.tp_size, most)
            if old
            else capacity_main(spec.tp_size, most, fused=fused, mega_moe=mega_moe)
        ),
        experts=spec.experts,
        top_k=spec.top_k,
        quantisation="w8a8_dynamic" if spec.quantisation == "w8a8" else spec.quantisation,
        fused_mode=1 if fused else 0,
        mega_moe=mega_moe,
    )
    if old and deployment.soc not in ("A2", "A3"):
        return "allgather"  # 0.13 raises for other SoCs; what it would take without expert parallelism
    return choose_0_13(situation) if old else choose_main(situation)
