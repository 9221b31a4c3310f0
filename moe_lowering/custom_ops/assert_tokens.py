"""``assert_tokens``: refuses to run a graph outside the range of token counts that it was made for.

A guard is a request to dynamo, and compile caches drop it; this check is part of the graph. It reads the shape on the
host and no data, so it costs nothing on the device and can be captured.
"""

from __future__ import annotations

from torch import Tensor

from moe_lowering.custom_ops.library import register
from moe_lowering.custom_ops.sizes import token_count

NOTHING = -1  # hi of a graph that must not run
# The operator knows only the range of its graph; a new compile helps only for T that the deployment declares.
ADVICE = (
    "if T is outside of min_tokens to max_tokens of the Deployment, declare a wider range there (a new compile does not "
    "help); else compile again for this T"
)
SCHEMA = "assert_tokens(Tensor x, int lo, int hi) -> ()"


def _real(x: Tensor, lo: int, hi: int) -> None:
    """Raises RuntimeError when T, the product of the leading dimensions of ``x [..., H]``, is not in lo..hi.

    ``hi`` -1 accepts no T at all.
    """
    tokens = token_count(x.shape)
    if hi == NOTHING:
        raise RuntimeError(
            f"assert_tokens: T is {tokens}, but this graph must not run with any T: the other ranks lowered this MoE block "
            "and this one could not; the lowering's report says why"
        )
    if not lo <= tokens <= hi:
        raise RuntimeError(
            f"assert_tokens: T is {tokens}, but this graph was lowered for T from {lo} to {hi}; {ADVICE}"
        )


def _fake(x: Tensor, lo: int, hi: int) -> None:
    if lo > hi and hi != NOTHING:
        raise ValueError(
            f"assert_tokens: lo is {lo} and hi is {hi}; accepted: lo <= hi, or hi {NOTHING} for no T at all"
        )


register(SCHEMA, cpu=_real, npu=_real, fake=_fake, side_effect=True)
