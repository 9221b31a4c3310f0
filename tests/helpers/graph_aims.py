"""Cases of ``graph_strategies``, changed so that an implementation is legal (``aimed``), or so that int4 fits (``sized``)."""

from __future__ import annotations

import math
from typing import Any

import graph_draws as st
import torch
from graph_cases import FOREIGN, BlockCase, GraphCase

ACROSS = "scope_across"  # a scope between two stages, which no implementation takes
# More oddities that an implementation does not take, beside those that make a chain no block.
AGAINST = {"allgather": ("weights_from_counts",), "fused_mc2": ("weights_from_counts", "counts_read_early")}
# One of these is enough to make a block illegal for an implementation; ``ACROSS`` for one that is not here.
FLAWS: dict[str, tuple[dict[str, Any], ...]] = {
    "allgather": ({"odd": (ACROSS,)}, {"odd": ("weights_from_counts",)}),
    "mc2": ({"mask": True}, {"odd": (ACROSS,)}),
    "fused_mc2": (
        {"mask": True}, {"transposed": True}, {"interleaved": True}, {"bias": (True, False)}, {"bias": (False, True)},
        {"activation": "swiglu_clamp", "limit": 0.7}, {"activation": "gelu"}, {"odd": ("counts_read_early",)},
    ),
}  # fmt: skip


def aimed(case: GraphCase, aim: str, draw: Any) -> GraphCase:
    """The case with what keeps an implementation from being legal put right, as far as blocks and sizes go.

    One in six has a flaw all the same, and asks for the implementation: illegal by one rule alone.
    """
    blocks = tuple(_aimed_block(block, aim) for block in case.blocks)
    case = asking(case.replace(blocks=blocks), st.rarely(draw, aim, "auto"))
    most = min(case.deployment.max_tokens or 512, 512)
    if aim not in ("allgather", "alltoall"):
        lead = case.lead if 1 <= math.prod(case.lead) <= most else (most,)
        case = case.replace(lead=lead, dtype=torch.float16 if case.dtype == torch.float32 else case.dtype)
    if draw(st.integers(0, 5)) < 5:
        return case
    flaw = draw(st.sampled_from(FLAWS.get(aim, ({"odd": (ACROSS,)},))))
    return asking(case.replace(blocks=tuple(block.replace(**flaw) for block in case.blocks)), aim)


def asking(case: GraphCase, comm: str) -> GraphCase:
    """With another ``comm``, and a policy that goes with it."""
    fits = case.policy in ("auto", "fixed") if comm != "auto" else case.policy != "fixed"
    return case.replace(comm=comm, policy=case.policy if fits else "auto")


def _aimed_block(block: BlockCase, aim: str) -> BlockCase:
    odd = tuple(name for name in block.odd if name not in (ACROSS, *AGAINST.get(aim, ()), *FOREIGN))
    block = block.replace(odd=odd, arguments=(), top_k=min(block.top_k, 16))
    if aim == "fused_mc2":
        plain = {"activation": "swiglu", "limit": 0.0, "interleaved": False, "bias": (False, False)}
        block = block.replace(**plain, transposed=False)
        block = block.replace(quantisation="none") if block.quantisation == "w4a16" else block
    return block if aim in ("allgather", "alltoall") else block.replace(mask=False)


def sized(case: GraphCase) -> GraphCase:
    """With w8a8 where int4 does not fit: it is packed by eight, and w4a16 is not for float32."""
    return case.replace(blocks=tuple(_packable(block, case) for block in case.blocks))


def _packable(block: BlockCase, case: GraphCase) -> BlockCase:
    if block.quantisation != "none":  # a flaw may have brought these back
        block = block.replace(transposed=False, bias=(False, False))
    odd = case.symbolic_hidden or case.hidden % 8 or block.intermediate % 4
    if (block.quantisation == "w4a8" and odd) or (
        block.quantisation == "w4a16" and (odd or case.dtype == torch.float32)
    ):
        return block.replace(quantisation="w8a8")
    return block.replace(quantisation="none") if "quantised" in block.odd else block
