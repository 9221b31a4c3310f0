"""A layer of torch_npu operators that already is what would be chosen, and what a change does to an overlap that it had."""

from __future__ import annotations

from collections import Counter

from moe_lowering.number_words import count_of
from moe_lowering.passes.raise_foreign.records import ForeignBlock
from moe_lowering.report.records import BlockReport
from moe_lowering.vocabulary import ONE_OPERATOR

# Operators of which the experts of a block consist; the two ends are the implementation's.
EXPERT_OPERATORS = frozenset({
    "npu.npu_grouped_matmul", "npu.npu_swiglu", "npu.npu_clipped_swiglu", "npu.npu_dequant_swiglu_quant",
    "npu.npu_grouped_matmul_swiglu_quant_v2", "npu.npu_swiglu_quant", "custom.npu_swiglu_clip_quant",
})  # fmt: skip


def expert_operators(names: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    """How many of each of these operators there are among some."""
    return tuple(sorted(Counter(name for name in names if name in EXPERT_OPERATORS).items()))


def is_unchanged(layer: ForeignBlock, report: BlockReport) -> bool:
    """Whether lowering gave the implementation that the layer is written as, with the same operators for its experts.

    Where it would put gate and up side by side in every forward, it is left too: a copy of the weights costs more than a matmul.
    """
    if not layer.own or report.comm != layer.own:
        return False
    return layer.w13.joined or expert_operators(report.ops_after) == layer.own_operators


def order_notes(layer: ForeignBlock, comm: str | None) -> tuple[str, ...]:
    """What became of what was put between a layer's operators, where it was changed."""
    if comm is None or (comm == layer.own and not layer.edges):
        return ()
    notes = []
    if layer.edges:
        waited = count_of(len(layer.edges), "operation")
        notes.append(
            f"[raise.order] {waited} waited for a value inside of the layer: now for its input, or for its result where that is "
            "before them"
        )
    if layer.overlaps:
        kept = "lost: it is one operator" if comm in ONE_OPERATOR else "kept: dispatch stands where it stood"
        notes.append(f"[raise.overlap] what another stream did between dispatch and combine: the overlap is {kept}")
    return tuple(notes)
