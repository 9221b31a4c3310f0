"""Which cells of the matrix must be refused, and with which code. Written from the rules' sources, not from the tables.

A cell may break more rules than are named here; those named here it must break, and a cell that breaks none of them must
be legal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from moe_lowering.matrix.cells import SCENARIOS, Cell
from moe_lowering.matrix.forms import FORMS
from moe_lowering.vocabulary import EXPERT_FORMATS, ExpertFormat


@dataclasses.dataclass(frozen=True)
class Refusal:
    """One rule: cells of ``forms`` for which ``applies`` holds are refused with ``code``."""

    code: str
    forms: tuple[str, ...]
    applies: Callable[[Cell], bool]
    why: str


ONLY = ".ep_size"
EVERY = tuple(FORMS)
ALLTOALL = tuple(form.name for form in FORMS.values() if form.comm == "alltoall")
FUSED = FFN, MEGA, DECODE = "dispatch_ffn_combine", "mega_moe", "dispatch_gmm_combine_decode"


def _format(cell: Cell) -> ExpertFormat:
    return EXPERT_FORMATS[cell.quantisation]


def _masked(cell: Cell) -> bool:
    return SCENARIOS[cell.scenario].masked or SCENARIOS[cell.scenario].padded


def _no_tokens(cell: Cell) -> bool:
    return SCENARIOS[cell.scenario].tokens == 0 or SCENARIOS[cell.scenario].idle


def _int8_tokens(cell: Cell) -> bool:
    return SCENARIOS[cell.scenario].quantised


def _list_of_int_weights(cell: Cell) -> bool:
    return cell.weights_are.lists and _format(cell).int8_rows


def _other_format_than_mega(cell: Cell) -> bool:
    wanted = "nz" if _format(cell).quantised else "nd"
    return not _format(cell).weight_only and cell.weights_are.weight_format != wanted


def _one_rank(cell: Cell) -> bool:
    return cell.ep == 1


REFUSALS = (
    Refusal(
        "Deployment", EVERY, lambda c: c.ep % c.tp != 0,
        "the ranks of a TP group are ranks of one EP group (DESIGN, generic operators)",
    ),
    Refusal(
        "block.tp_counts", EVERY, lambda c: SCENARIOS[c.scenario].counts and SCENARIOS[c.scenario].tokens % c.tp != 0,
        "tokens are padded per TP rank, and the padding would be counted (facts/vllm_ascend.md 2.3)",
    ),
    Refusal("alltoall.ep_size", ALLTOALL, _one_rank, "nobody to exchange rows with (facts/vllm_ascend.md 1.1)"),
    Refusal("alltoall.tokens", ("alltoall_static",), _no_tokens, "buffers are filled from a rank's own rows"),
    Refusal("mc2.ep_size", ("mc2",), _one_rank, "A3: 2 to 768 ranks (facts/cann_ops.md 1.1)"),
    Refusal("mc2.tokens", ("mc2",), _no_tokens, "1 to 512 tokens (facts/cann_ops.md 1.1)"),
    Refusal(
        "mc2.mask_global_bs", ("mc2",), lambda c: _masked(c) and SCENARIOS[c.scenario].unequal,
        "with different token counts the mask must be all true (facts/cann_ops.md 1.1); both are never passed (1.4)",
    ),
    Refusal(
        "mc2.x_dtype", ("mc2",), _int8_tokens, "dispatch takes 16-bit tokens and quantises them (facts/cann_ops.md 1.1)"
    ),
    Refusal(
        "gmm.quant_single_weight", ("allgather", *ALLTOALL, "mc2"), _list_of_int_weights,
        "int8 tokens want one tensor of weights (aclnnGroupedMatmulV5, A8W8; A8W4: its per-token scale)",
    ),
    Refusal("fused.ep_size", FUSED, _one_rank, "nobody to exchange rows with (facts/vllm_ascend.md 1.1)"),
    Refusal(
        "fused.quantisation", FUSED, lambda c: _format(c).weight_only,
        "int32 weights are W4A8 to them (facts/vllm_ascend.md 3.1, facts/cann_ops.md 1.6)",
    ),
    Refusal(
        "fused_decode.weight_dtype", (DECODE,), lambda c: _format(c).int8_rows and _format(c).packed > 1,
        "int8 or 16-bit weights (facts/vllm_ascend.md 3.6)",
    ),
    Refusal(
        "fused.quantised_input", (FFN,), _int8_tokens,
        "it takes 16-bit tokens and quantises them (facts/vllm_ascend.md 3.5)",
    ),
    Refusal("mega_moe.x_dtype", (MEGA,), _int8_tokens, "bfloat16 tokens (facts/cann_ops.md 1.6)"),
    Refusal("fused_decode.x_dtype", (DECODE,), _int8_tokens, "16-bit tokens (facts/vllm_ascend.md 3.6)"),
    Refusal(
        "fused.weight_format", (FFN,), lambda c: c.weights_are.weight_format == "nd",
        "the wrapper says FRACTAL_NZ whatever the weights are (facts/vllm_ascend.md 3.2)",
    ),
    Refusal(
        "mega_moe.weight_list", (MEGA,), lambda c: not c.weights_are.lists,
        "a list with one tensor for each expert (facts/cann_ops.md 1.6)",
    ),
    Refusal(
        "mega_moe.weight_format", (MEGA,), _other_format_than_mega,
        "int8 and int4 in FRACTAL_NZ (facts/cann_ops.md 1.6), 16 bits in ND (facts/vllm_ascend.md 2.5)",
    ),
    Refusal("fused.tokens", (FFN,), _no_tokens, "1 to 512 tokens of a TP rank (facts/cann_ops.md 0.1)"),
    Refusal("mega_moe.tokens", (MEGA,), _no_tokens, "1 to 4,096 tokens (facts/cann_ops.md 1.6)"),
    Refusal("fused_decode.tokens", (DECODE,), _no_tokens, "1 to 256 tokens (facts/vllm_ascend.md 3.6)"),
    Refusal(
        "fused.mask", (FFN,), lambda c: _masked(c) and not _format(c).quantised,
        "the 16-bit variant ignores the mask (facts/vllm_ascend.md 3.1)",
    ),
    Refusal(
        "mega_moe.equal_tokens", (MEGA,), lambda c: SCENARIOS[c.scenario].unequal,
        "token counts are equal on all ranks on A2 and A3 (facts/cann_ops.md 1.6)",
    ),
    Refusal(
        "fused_decode.mask", (DECODE,), lambda c: SCENARIOS[c.scenario].masked,
        "it sends the first n tokens, n the number of True in the mask (vllm-ascend 38179739, its dispatch)",
    ),
)  # fmt: skip


def refusals(cell: Cell) -> tuple[str, ...]:
    """Codes that the cell must be refused with; () when it must be legal."""
    found = tuple(rule.code for rule in REFUSALS if cell.form in rule.forms and rule.applies(cell))
    if "Deployment" in found:
        return ("Deployment",)  # nothing else is looked at then
    if any(code.endswith(ONLY) for code in found):  # nor are the operators of what one rank has no use for
        return tuple(code for code in found if code.endswith(ONLY) or code.startswith("block."))
    return found
