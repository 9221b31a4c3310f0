"""``assert_tokens``: refuses to run a graph outside the range of token counts that it was made for.

A guard is a request to dynamo, and compile caches drop it; this check is part of the graph. It reads the shape on the
host and no data, so it costs nothing on the device and can be captured.
"""

from __future__ import annotations

from torch import Tensor

from moe_lowering.custom_ops.library import register
from moe_lowering.custom_ops.sizes import token_count

NOTHING = -1  # the ``hi`` of a graph that must never run: no T is in its range
SCHEMA = "assert_tokens(Tensor x, int lo, int hi, *, int min_tokens=0, int max_tokens=0) -> ()"


def refusal_of(lo: int, hi: int, min_tokens: int = 0, max_tokens: int = 0) -> str:
    """The text that follows a refused T in the error. ``min_tokens`` and ``max_tokens`` are those of the Deployment, 0
    for none."""
    if hi == NOTHING:
        return (
            "this graph must not run with any T: the other ranks lowered this MoE block and this one could not; the "
            "lowering's report says why"
        )
    text = f"this graph was lowered for T from {lo} to {hi}; "
    if not max_tokens:
        return f"{text}compile again for this T (the Deployment declares no max_tokens)"
    return (
        f"{text}the Deployment's min_tokens is {min_tokens} and its max_tokens {max_tokens}: for T outside of that declare a "
        "wider range there (a new compile does not help), for T within compile again"
    )


def _real(x: Tensor, lo: int, hi: int, *, min_tokens: int = 0, max_tokens: int = 0) -> None:
    """Raises RuntimeError when T, the product of the leading dimensions of ``x [..., H]``, is not in lo..hi.

    ``hi`` -1 accepts no T at all. ``min_tokens`` and ``max_tokens`` are the Deployment's, for the message; ``max_tokens`` 0
    when it declares none.
    """
    tokens = token_count(x.shape)
    if not lo <= tokens <= hi:
        raise RuntimeError(f"assert_tokens: T is {tokens}, but {refusal_of(lo, hi, min_tokens, max_tokens)}")


def _fake(x: Tensor, lo: int, hi: int, *, min_tokens: int = 0, max_tokens: int = 0) -> None:
    if lo > hi and hi != NOTHING:
        raise ValueError(
            f"assert_tokens: lo is {lo} and hi is {hi}; accepted: lo <= hi, or hi {NOTHING} for no T at all"
        )


register(SCHEMA, cpu=_real, npu=_real, fake=_fake, side_effect=True)
