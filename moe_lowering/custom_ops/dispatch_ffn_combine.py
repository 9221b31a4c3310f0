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

from typing import Any

import torch
from torch import Tensor

from moe_lowering.custom_ops.exchange import open_group
from moe_lowering.custom_ops.fused import (
    HALVES,
    Experts,
    Tensors,
    check_experts,
    check_form,
    check_group,
    check_known,
    check_limit,
    check_mask,
    check_quantisation,
    check_tokens,
    check_top_k,
    provided,
    run_layer,
    unify_tokens,
    wide_scale,
    zero_masked,
)
from moe_lowering.custom_ops.library import register
from moe_lowering.custom_ops.sizes import known
from moe_lowering.vocabulary import EXPERT_FORMATS

NAME = "dispatch_ffn_combine"
SCHEMA = (
    f"{NAME}(Tensor x, Tensor[] w13, Tensor[] w2, Tensor ids, Tensor weights, str group, int ep_size, "
    'int max_output_size, str quantisation="none", Tensor[]? w13_scale=None, Tensor[]? w2_scale=None, '
    "Tensor[]? w13_scale_bias=None, Tensor[]? w2_scale_bias=None, Tensor? mask=None, float swiglu_limit=0.0) "
    "-> (Tensor y, Tensor expert_token_nums)"
)
MOST_RANKS = 32  # MAX_RANK_SIZE of its kernels
SCALES = (torch.float32, torch.int64)
NO_COUNT = -1


def _check(
    x: Tensor,
    experts: Experts,
    ids: Tensor,
    weights: Tensor,
    group: str,
    ep_size: int,
    max_output_size: int,
    mask: Tensor | None,
    swiglu_limit: float,
) -> None:
    """Raises for what the real operator refuses, or computes wrongly without a word.

    Sources: vllm_ascend.ffn_adapter, vllm_ascend.ffn_api, vllm_ascend.ffn_definition: dtypes and formats;
    vllm_ascend.ffn_kernel, vllm_ascend.ffn_kernel_16_bit: what they compute wrongly.
    """
    check_quantisation(NAME, experts.quantisation)
    quantised = EXPERT_FORMATS[experts.quantisation].quantised
    check_tokens(NAME, x, ids, weights, (torch.bfloat16,) if quantised else HALVES)
    if known(x.shape[1] % 32 != 0):
        raise ValueError(f"{NAME}: x has hidden size {x.shape[1]}; accepted: a multiple of 32")
    check_group(NAME, group, ep_size, MOST_RANKS)
    if max_output_size < 1:
        raise ValueError(f"{NAME}: max_output_size is {max_output_size}; accepted: 1 or more")
    check_form(NAME, experts)
    if not quantised and known(experts.local == 2):
        raise ValueError(
            f"{NAME}: w13 holds 2 experts; accepted: 1, or 3 or more, as the 16-bit kernel skips SwiGLU for 2"
        )
    if quantised and known(experts.local < 2):
        raise ValueError(
            f"{NAME}: w13 holds {experts.local} expert; accepted: 2 or more, as the quantised kernels skip SwiGLU for 1"
        )
    check_experts(NAME, experts, x, SCALES)
    check_top_k(NAME, ids, ep_size * experts.local)
    check_mask(NAME, mask, x, (torch.bool,))
    check_limit(NAME, "swiglu_limit", swiglu_limit)
    for name, given in (("mask", mask is not None), ("swiglu_limit", swiglu_limit > 0)):
        if given and not quantised:
            raise ValueError(f"{NAME}: {name} is given for 16-bit weights, whose kernel ignores it; accepted: none")


def _experts(quantisation: str, w13: Tensors, w2: Tensors, *lists: Tensors | None) -> Experts:
    return Experts(quantisation, w13, w2, *(tensors or () for tensors in lists))


def _fake(
    x: Tensor,
    w13: Tensors,
    w2: Tensors,
    ids: Tensor,
    weights: Tensor,
    group: str,
    ep_size: int,
    max_output_size: int,
    quantisation: str = "none",
    w13_scale: Tensors | None = None,
    w2_scale: Tensors | None = None,
    w13_scale_bias: Tensors | None = None,
    w2_scale_bias: Tensors | None = None,
    mask: Tensor | None = None,
    swiglu_limit: float = 0.0,
) -> tuple[Tensor, Tensor]:
    experts = _experts(quantisation, w13, w2, w13_scale, w2_scale, w13_scale_bias, w2_scale_bias)
    _check(x, experts, ids, weights, group, ep_size, max_output_size, mask, swiglu_limit)
    unify_tokens(x, ids, weights, mask)
    return x.new_empty(x.shape), x.new_empty((experts.local,), dtype=torch.int32)


def _cpu(
    x: Tensor,
    w13: Tensors,
    w2: Tensors,
    ids: Tensor,
    weights: Tensor,
    group: str,
    ep_size: int,
    max_output_size: int,
    quantisation: str = "none",
    w13_scale: Tensors | None = None,
    w2_scale: Tensors | None = None,
    w13_scale_bias: Tensors | None = None,
    w2_scale_bias: Tensors | None = None,
    mask: Tensor | None = None,
    swiglu_limit: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The same over gloo. Results of both matmuls pass through float16, for bfloat16 too, as in the kernel's source.

    Rows past ``max_output_size`` raise on all ranks; the real operator drops them silently.
    """
    experts = _experts(quantisation, w13, w2, w13_scale, w2_scale, w13_scale_bias, w2_scale_bias)
    _check(x, experts, ids, weights, group, ep_size, max_output_size, mask, swiglu_limit)
    y, counts = run_layer(
        NAME, x, ids, weights, mask, experts, open_group(NAME, "ep", group, ep_size), between=torch.float16,
        limit=swiglu_limit, rows=max_output_size, rows_name=f"max_output_size, {max_output_size}",
    )  # fmt: skip
    return y, counts.to(torch.int32)


def _npu(
    x: Tensor,
    w13: Tensors,
    w2: Tensors,
    ids: Tensor,
    weights: Tensor,
    group: str,
    ep_size: int,
    max_output_size: int,
    quantisation: str = "none",
    w13_scale: Tensors | None = None,
    w2_scale: Tensors | None = None,
    w13_scale_bias: Tensors | None = None,
    w2_scale_bias: Tensors | None = None,
    mask: Tensor | None = None,
    swiglu_limit: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Calls the provider. Its returns are not used: they are ``out`` and ``expert_token_nums`` once more.

    Raises:
        RuntimeError: no provider is installed.
        NotImplementedError: the version that is installed has no argument for something that is asked for, or one that is
            not known here.
    """
    experts = _experts(quantisation, w13, w2, w13_scale, w2_scale, w13_scale_bias, w2_scale_bias)
    _check(x, experts, ids, weights, group, ep_size, max_output_size, mask, swiglu_limit)
    operator, names = provided(NAME)
    for name, wanted, why in (
        ("expert_token_nums", not EXPERT_FORMATS[quantisation].quantised, "16-bit weights"),
        ("bias1", EXPERT_FORMATS[quantisation].has_scale_bias, f"quantisation {quantisation!r}"),
        ("x_active_mask", mask is not None, "mask"),
        ("swiglu_limit", swiglu_limit > 0, "swiglu_limit"),
    ):
        if wanted and name not in names:
            raise NotImplementedError(
                f"{NAME}: {why} is asked for, and the operator that is registered has no argument {name}; accepted: "
                "a newer vllm-ascend (0.20.2 has all)"
            )
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    counts = x.new_full((experts.local,), NO_COUNT, dtype=torch.int32)
    arguments = {
        "x": x.contiguous(),
        "weight1": list(w13),
        "weight2": list(w2),
        "expert_idx": ids.clone(memory_format=torch.contiguous_format),
        **_scales(experts, x),
        "probs": weights.contiguous(),
        "group": group,
        "max_output_size": max_output_size,
        "out": out,
        "expert_token_nums": counts,
        "x_active_mask": None if mask is None else mask.contiguous(),
        "swiglu_limit": float(swiglu_limit),
        "world_size": ep_size,  # the operator's own default, 0, is refused by its host tiling
    }
    check_known(NAME, names, arguments)
    operator(**{name: value for name, value in arguments.items() if name in names})
    return zero_masked(out, mask), counts


def _scales(experts: Experts, x: Tensor) -> dict[str, Any]:
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


register(SCHEMA, cpu=_cpu, fake=_fake, npu=_npu, side_effect=True)
