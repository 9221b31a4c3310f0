"""``dispatch_ffn_combine``: a functional wrapper of vllm-ascend's fused operator, in 16 bits, W8A8 and W4A8.

``_C_ascend::dispatch_ffn_combine`` writes into ``out`` and ``expert_token_nums``, which it also returns without saying so
in its schema. Its arguments grew from version to version (limits/schemas.toml), so the wrapper looks at the schema that
is registered, gives it what it knows, and refuses what that one cannot say. The variant follows from the weights' dtype;
the 16-bit one ignores masks and limits, so those are refused.

``expert_token_nums`` [E_local] int32 counts the rows of each local expert from all ranks. Version 0.13 does not give it:
it is -1 then, since making it would need a collective on a communicator that is the operator's own.

Every rank of the group must call it equally often, with zero tokens too; T may differ between ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic

import torch
from torch import Tensor
from typing_extensions import NamedTuple

from moe_lowering.custom_ops.exchange import open_group
from moe_lowering.custom_ops.fused import (
    HALVES,
    ExpertTensors,
    check_experts,
    check_form,
    check_group,
    check_known,
    check_limit,
    check_mask,
    check_quantisation,
    check_tokens,
    check_top_k,
    find_provider_operator,
    run_layer,
    unify_tokens,
    wide_scale,
    zero_masked_rows,
)
from moe_lowering.custom_ops.library import Value, register, schema_of
from moe_lowering.custom_ops.sizes import is_known
from moe_lowering.custom_ops.token_exchange import Bounds
from moe_lowering.vocabulary import EXPERT_FORMATS

NAME = "dispatch_ffn_combine"


class DispatchFfnCombineCall(NamedTuple, Generic[Value]):
    """The arguments of ``dispatch_ffn_combine``; of tokens as in ``fused.FusedCall``, of experts as in ``fused.ExpertTensors``.

    ``max_output_size`` bounds the rows that this rank receives; ``swiglu_limit`` is that of SwiGLU's inputs, 0 for none.
    """

    x: Value
    w13: Sequence[Value]
    w2: Sequence[Value]
    ids: Value
    weights: Value
    group: str
    ep_size: int
    max_output_size: int
    quantisation: str = "none"
    w13_scale: Sequence[Value] | None = None
    w2_scale: Sequence[Value] | None = None
    w13_scale_bias: Sequence[Value] | None = None
    w2_scale_bias: Sequence[Value] | None = None
    mask: Value | None = None
    swiglu_limit: float = 0.0


SCHEMA = schema_of(NAME, DispatchFfnCombineCall, "(Tensor y, Tensor expert_token_nums)")
MOST_RANKS = 32  # MAX_RANK_SIZE of its kernels
SCALES = (torch.float32, torch.int64)
NO_COUNT = -1


def counts_of_a_row(quantisation: str) -> int:
    """How often the operator counts one row against ``max_output_size``.

    Sources: vllm_ascend.ffn_kernel_w4a8, vllm_ascend_issue.14869: W4A8's combine adds up two for each row.
    """
    return 2 if quantisation == "w4a8" else 1


def _check(call: DispatchFfnCombineCall[Tensor]) -> ExpertTensors:
    """Raises for what the real operator refuses, or computes wrongly without a word.

    Sources: vllm_ascend.ffn_adapter, vllm_ascend.ffn_api, vllm_ascend.ffn_definition: dtypes and formats;
    vllm_ascend.ffn_kernel, vllm_ascend.ffn_kernel_16_bit: what they compute wrongly.
    """
    x, experts = call.x, ExpertTensors.of(call.quantisation, call)
    check_quantisation(NAME, experts.quantisation)
    quantised = EXPERT_FORMATS[experts.quantisation].quantised
    check_tokens(NAME, call, (torch.bfloat16,) if quantised else HALVES)
    if is_known(x.shape[1] % 32 != 0):
        raise ValueError(f"{NAME}: x has hidden size {x.shape[1]}; accepted: a multiple of 32")
    check_group(NAME, call.group, call.ep_size, MOST_RANKS)
    if call.max_output_size < 1:
        raise ValueError(f"{NAME}: max_output_size is {call.max_output_size}; accepted: 1 or more")
    check_form(NAME, experts)
    if not quantised and is_known(experts.local == 2):
        raise ValueError(
            f"{NAME}: w13 holds 2 experts; accepted: 1, or 3 or more, as the 16-bit kernel skips SwiGLU for 2"
        )
    if quantised and is_known(experts.local < 2):
        raise ValueError(
            f"{NAME}: w13 holds {experts.local} expert; accepted: 2 or more, as the quantised kernels skip SwiGLU for 1"
        )
    check_experts(NAME, experts, x, SCALES)
    check_top_k(NAME, call.ids, call.ep_size * experts.local)
    check_mask(NAME, call, (torch.bool,))
    check_limit(NAME, "swiglu_limit", call.swiglu_limit)
    for name, present in (("mask", call.mask is not None), ("swiglu_limit", call.swiglu_limit > 0)):
        if present and not quantised:
            raise ValueError(f"{NAME}: {name} is given for 16-bit weights, whose kernel ignores it; accepted: none")
    return experts


def _fake(call: DispatchFfnCombineCall[Tensor]) -> tuple[Tensor, Tensor]:
    experts = _check(call)
    unify_tokens(call)
    return call.x.new_empty(call.x.shape), call.x.new_empty((experts.local,), dtype=torch.int32)


def _cpu(call: DispatchFfnCombineCall[Tensor]) -> tuple[Tensor, Tensor]:
    """The same over gloo. Results of both matmuls pass through float16, for bfloat16 too, as in the kernel's source.

    Rows past ``max_output_size``, or past half of it in W4A8 (``counts_of_a_row``), raise on all ranks; the real operator
    drops them silently.
    """
    experts = _check(call)
    ep = open_group(NAME, "ep", call.group, call.ep_size)
    times, most = counts_of_a_row(call.quantisation), call.max_output_size
    bounds = Bounds(most // times, f"max_output_size, {most}" if times == 1 else f"half of max_output_size, {most}")
    y, counts = run_layer(NAME, call, experts, ep, between=torch.float16, limit=call.swiglu_limit, bounds=bounds)
    return y, counts.to(torch.int32)


def _npu(call: DispatchFfnCombineCall[Tensor]) -> tuple[Tensor, Tensor]:
    """Calls the provider. Its returns are not used: they are ``out`` and ``expert_token_nums`` once more.

    Raises:
        RuntimeError: no provider is installed.
        NotImplementedError: the version that is installed has no argument for something that is asked for, or one that is
            not known here.
    """
    experts, x, mask, swiglu_limit = _check(call), call.x, call.mask, call.swiglu_limit
    form = EXPERT_FORMATS[call.quantisation]
    operator, names = find_provider_operator(NAME)
    for name, expected, why in (
        ("expert_token_nums", not form.quantised, "16-bit weights"),
        ("bias1", form.has_scale_bias, f"quantisation {call.quantisation!r}"),
        ("x_active_mask", mask is not None, "mask"),
        ("swiglu_limit", swiglu_limit > 0, "swiglu_limit"),
    ):
        if expected and name not in names:
            raise NotImplementedError(
                f"{NAME}: {why} is asked for, and the operator that is registered has no argument {name}; accepted: "
                "a newer vllm-ascend (0.20.2 has all)"
            )
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    counts = x.new_full((experts.local,), NO_COUNT, dtype=torch.int32)
    arguments = {
        "x": x.contiguous(),
        "weight1": list(call.w13),
        "weight2": list(call.w2),
        "expert_idx": call.ids.clone(memory_format=torch.contiguous_format),
        **_scales(experts, x),
        "probs": call.weights.contiguous(),
        "group": call.group,
        "max_output_size": call.max_output_size,
        "out": out,
        "expert_token_nums": counts,
        "x_active_mask": None if mask is None else mask.contiguous(),
        "swiglu_limit": float(swiglu_limit),
        "world_size": call.ep_size,  # the operator's own default, 0, is refused by its host tiling
    }
    check_known(NAME, names, arguments)
    operator(**{name: value for name, value in arguments.items() if name in names})
    return zero_masked_rows(out, mask), counts


def _scales(experts: ExpertTensors, x: Tensor) -> dict[str, Any]:
    """Scales and biases as the operator takes them; empty tensors where there are none."""
    no_scale, no_bias = x.new_empty((0,), dtype=torch.int64), x.new_empty((0,), dtype=torch.float32)
    form = EXPERT_FORMATS[experts.quantisation]
    quantised, biased = form.quantised, form.has_scale_bias
    return {
        "scale1": experts.in_form(experts.w13_scale, wide_scale) if quantised else [no_scale],
        "scale2": experts.in_form(experts.w2_scale, wide_scale) if quantised else [no_scale],
        "bias1": experts.in_form(experts.w13_scale_bias) if biased else [no_bias],
        "bias2": experts.in_form(experts.w2_scale_bias) if biased else [no_bias],
    }


register(SCHEMA, DispatchFfnCombineCall, cpu=_cpu, fake=_fake, npu=_npu, side_effect=True)
