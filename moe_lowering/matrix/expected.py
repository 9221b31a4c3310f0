"""Which cells of the matrix must be refused, and with which code. Written from the rules' sources, not from the tables.

A cell may break more rules than are named here; those named here it must break, and a cell that breaks none of them must
be legal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from moe_lowering.matrix.cells import SCENARIOS, Cell
from moe_lowering.matrix.forms import FORMS
from moe_lowering.vocabulary import EXPERT_FORMATS, FINALIZE_ROUTING, ExpertFormat


@dataclasses.dataclass(frozen=True)
class ExpectedRefusal:
    """One rule: cells of ``forms`` for which ``applies`` holds are refused with ``code``. ``why`` is a citation."""

    code: str
    forms: tuple[str, ...]
    applies: Callable[[Cell], bool]
    why: str


ONLY = ".ep_size"
EVERY = tuple(FORMS)
UNPERMUTE = tuple(form.name for form in FORMS.values() if form.unpermutes)
ALLTOALL = tuple(form.name for form in FORMS.values() if form.comm == "alltoall")
FUSED = FFN, MEGA, DECODE = "dispatch_ffn_combine", "mega_moe", "dispatch_gmm_combine_decode"


def _format(cell: Cell) -> ExpertFormat:
    return EXPERT_FORMATS[cell.quantisation]


def _has_mask(cell: Cell) -> bool:
    return SCENARIOS[cell.scenario].masked or SCENARIOS[cell.scenario].padded


def _is_without_tokens(cell: Cell) -> bool:
    return SCENARIOS[cell.scenario].no_token or SCENARIOS[cell.scenario].idle


def _int8_tokens(cell: Cell) -> bool:
    return SCENARIOS[cell.scenario].quantised


def _list_of_int_weights(cell: Cell) -> bool:
    return cell.weights_are.lists and _format(cell).int8_rows


def _other_format_than_mega(cell: Cell) -> bool:
    required = "nz" if _format(cell).quantised else "nd"
    return not _format(cell).weight_only and cell.weights_are.weight_format != required


def _one_rank(cell: Cell) -> bool:
    return cell.ep == 1


REFUSALS = (
    ExpectedRefusal(
        "Deployment", EVERY, lambda c: c.ep % c.tp != 0,
        "here.architecture: the ranks of a TP group are ranks of one EP group",
    ),
    ExpectedRefusal(
        "block.tp_counts", EVERY, lambda c: SCENARIOS[c.scenario].counts and SCENARIOS[c.scenario].tokens % c.tp != 0,
        "here.tensor_parallel: tokens are padded per TP rank, and the padding would be counted",
    ),
    ExpectedRefusal("alltoall.ep_size", ALLTOALL, _one_rank, "vllm_ascend.forward_context: nobody to exchange rows with"),
    ExpectedRefusal("mc2.ep_size", ("mc2",), _one_rank, "ops_transformer.dispatch: A3, 2 to 768 ranks"),
    ExpectedRefusal("mc2.tokens", ("mc2",), _is_without_tokens, "ops_transformer.dispatch: 1 to 512 tokens"),
    ExpectedRefusal(
        "mc2.mask_global_bs", ("mc2",), lambda c: _has_mask(c) and SCENARIOS[c.scenario].unequal,
        "ops_transformer.dispatch, vllm_ascend.token_dispatcher: the mask must be all true then, and both are never passed",
    ),
    ExpectedRefusal(
        "mc2.x_dtype", ("mc2",), _int8_tokens, "ops_transformer.dispatch: it takes 16-bit tokens and quantises them",
    ),
    ExpectedRefusal(
        "gmm.quant_single_weight", ("allgather", *ALLTOALL, "mc2"), _list_of_int_weights,
        "ops_transformer.grouped_matmul: int8 tokens want one tensor of weights (A8W8; A8W4: its per-token scale)",
    ),
    ExpectedRefusal(
        "finalize.empty", UNPERMUTE, lambda c: c.unpermute_operator == FINALIZE_ROUTING and SCENARIOS[c.scenario].no_token,
        "ops_transformer.finalize_routing: no empty tensor",
    ),
    ExpectedRefusal("fused.ep_size", FUSED, _one_rank, "vllm_ascend.forward_context: nobody to exchange rows with"),
    ExpectedRefusal(
        "fused.quantisation", FUSED, lambda c: _format(c).weight_only,
        "vllm_ascend.ffn_adapter, ops_transformer.mega_moe: int32 weights are W4A8 to them",
    ),
    ExpectedRefusal(
        "fused_decode.weight_dtype", (DECODE,), lambda c: _format(c).int8_rows and _format(c).packed > 1,
        "vllm_ascend.decode_definition: int8 or 16-bit weights",
    ),
    ExpectedRefusal(
        "fused.quantised_input", (FFN,), _int8_tokens,
        "vllm_ascend.ffn_definition: it takes 16-bit tokens and quantises them",
    ),
    ExpectedRefusal("mega_moe.x_dtype", (MEGA,), _int8_tokens, "ops_transformer.mega_moe: bfloat16 tokens"),
    ExpectedRefusal("fused_decode.x_dtype", (DECODE,), _int8_tokens, "vllm_ascend.decode_definition: 16-bit tokens"),
    ExpectedRefusal(
        "fused.weight_format", (FFN,), lambda c: c.weights_are.weight_format == "nd",
        "vllm_ascend.ffn_api: the wrapper says FRACTAL_NZ whatever the weights are",
    ),
    ExpectedRefusal(
        "mega_moe.weight_list", (MEGA,), lambda c: not c.weights_are.lists,
        "ops_transformer.mega_moe: a list with one tensor for each expert",
    ),
    ExpectedRefusal(
        "mega_moe.weight_format", (MEGA,), _other_format_than_mega,
        "ops_transformer.mega_moe, vllm_ascend.mega_moe: int8 and int4 in FRACTAL_NZ, 16 bits in ND",
    ),
    ExpectedRefusal("fused.tokens", (FFN,), _is_without_tokens, "vllm_ascend.forward_context: a token at least"),
    ExpectedRefusal("mega_moe.tokens", (MEGA,), _is_without_tokens, "ops_transformer.mega_moe: 1 to 4,096 tokens"),
    ExpectedRefusal("fused_decode.tokens", (DECODE,), _is_without_tokens, "vllm_ascend.decode_tiling: 1 to 256 tokens"),
    ExpectedRefusal(
        "fused.mask", (FFN,), lambda c: _has_mask(c) and not _format(c).quantised,
        "vllm_ascend.ffn_adapter: the 16-bit variant ignores the mask",
    ),
    ExpectedRefusal(
        "mega_moe.equal_tokens", (MEGA,), lambda c: SCENARIOS[c.scenario].unequal,
        "ops_transformer.mega_moe: token counts are equal on all ranks on A2 and A3",
    ),
    ExpectedRefusal(
        "fused_decode.mask", (DECODE,), lambda c: SCENARIOS[c.scenario].masked,
        "vllm_ascend.decode_dispatch: it sends the first n tokens, n the number of True in the mask",
    ),
)  # fmt: skip


def refusals(cell: Cell) -> tuple[str, ...]:
    """Codes that the cell must be refused with; () when it must be legal."""
    codes = tuple(rule.code for rule in REFUSALS if cell.form in rule.forms and rule.applies(cell))
    if "Deployment" in codes:
        return ("Deployment",)  # then no other rule is evaluated
    if any(code.endswith(ONLY) for code in codes):  # nor rules of operators that exchange, which one rank does not call
        return tuple(code for code in codes if code.endswith(ONLY) or code.startswith("block."))
    return codes
