"""Judge: ask every implementation whether a block is legal for it, in this deployment. Every broken rule is reported.

A verdict depends on the block's record, the deployment's rank-invariant fields and the limit tables, and on nothing
else. T enters only when the deployment declares it equal on all ranks; otherwise the rules see the declared range, so
that a rank with one token and a rank with 512 reach the same verdict (two ranks that choose differently hang).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import sympy
import torch
from torch.utils._sympy.value_ranges import ValueRanges

from moe_lowering.deployment import Deployment
from moe_lowering.limits import Prover, check
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.passes.quantities import block_quantities
from moe_lowering.report.records import Verdict


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Verdicts of all implementations for one block, and what they were reached with.

    Attributes:
        verdicts: by implementation name.
        tokens: T as the rules saw it: an int, the graph's symbol, or a symbol with the declared range.
        prover: what it was taken to know of T.
        quantities: what was judged, by name.
    """

    verdicts: dict[str, Verdict]
    tokens: Any
    prover: Prover
    quantities: dict[str, Any]


def torch_npu_is_loaded() -> bool:
    """Whether torch_npu's operators are registered."""
    return hasattr(torch.ops.npu, "npu_grouped_matmul")


def declared_tokens(deployment: Deployment) -> Any:
    """A size with the range that the deployment declares for every rank."""
    return free_tokens(deployment.min_tokens, deployment.max_tokens)


def free_tokens(low: int, high: int) -> Any:
    """A size called T, anywhere from ``low`` to ``high``, in a ShapeEnv of its own: nothing else is known of it."""
    from torch._dynamo.source import ConstantSource  # slow to import, and rarely needed
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    env, source, hint = ShapeEnv(), ConstantSource("T"), max(low, min(high, 2))
    symbol = env.create_symbol(
        hint,
        source,
        dynamic_dim=DimDynamic.DYNAMIC,
        constraint_dim=None,
        positive=None,
        do_not_specialize_zero_one=True,
    )  # fmt: skip  (a size of this environment may be 0)
    env.var_to_range[symbol] = ValueRanges(sympy.Integer(low), sympy.Integer(high))
    return env.create_symintnode(symbol, hint=hint, source=source)


def outside_declared_range(tokens: Any, deployment: Deployment) -> bool:
    """With unequal token counts: whether this rank's T, whatever value it takes, breaks what the deployment declares."""
    if deployment.equal_tokens:
        return False
    low, high = Prover().bounds(tokens)
    return (low or 0) > deployment.max_tokens or (high is not None and high < deployment.min_tokens)


def judged_operators(implementation: str, spec: BlockSpec, soc: str) -> tuple[str, ...]:
    """The operators and pseudo-operators whose rules bind an implementation of a block."""
    return ("deployment", implementation, *IMPLEMENTATIONS[implementation].operators(spec, soc))


def judge(
    spec: BlockSpec, deployment: Deployment, tokens: Any, prover: Prover, torch_npu: bool | None = None
) -> Judgement:
    """The verdict of every implementation for this block.

    Args:
        tokens: T as the rules see it.
        prover: what may be taken as known of it, when it is symbolic.
        torch_npu: whether torch_npu's operators are there; None to look in this process.
    """
    loaded = torch_npu_is_loaded() if torch_npu is None else torch_npu
    quantities = block_quantities(spec, deployment, tokens, prover, loaded)
    versions = deployment.versions
    verdicts = {}
    for name in IMPLEMENTATIONS:
        operators = judged_operators(name, spec, deployment.soc)
        violations = [v for op in operators for v in check(op, deployment.soc, quantities, prover, versions)]
        verdicts[name] = Verdict(name, tuple(violations))
    return Judgement(verdicts, tokens, prover, quantities)
