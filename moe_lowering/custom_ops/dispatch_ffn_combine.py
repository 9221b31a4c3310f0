"""``dispatch_ffn_combine``: a functional wrapper of vllm-ascend's fused operator, its 16-bit variant.

``_C_ascend::dispatch_ffn_combine`` (vllm-ascend 0.23) sends the tokens, runs both grouped matmuls with SwiGLU (gate
first) between them, and combines, in one kernel. It writes into ``out`` and ``expert_token_nums``, which it also
returns without saying so in its schema; quantised variants write into the expert ids too. The wrapper allocates its
outputs and hands over a copy of the ids, so that a graph may treat it as a function. It has no bias, no mask and no
limit: the 16-bit kernel ignores all three.

Every rank of the group must call it equally often, with zero tokens too; T may differ between ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lowering.custom_ops.combine import send_back, weighted_sum
from moe_lowering.custom_ops.dispatch import exchange
from moe_lowering.custom_ops.exchange import ALONE, open_group
from moe_lowering.custom_ops.grouped_mlp import activate, check_per_expert, grouped_matmul
from moe_lowering.custom_ops.library import register
from moe_lowering.custom_ops.sizes import differ, known, show

SCHEMA = (
    "dispatch_ffn_combine(Tensor x, Tensor[] w13, Tensor[] w2, Tensor ids, Tensor weights, str group, int ep_size, "
    "int max_output_size) -> (Tensor y, Tensor expert_token_nums)"
)
HALVES = (torch.float16, torch.bfloat16)


def _check(
    x: Tensor,
    w13: Sequence[Tensor],
    w2: Sequence[Tensor],
    ids: Tensor,
    weights: Tensor,
    group: str,
    ep_size: int,
    max_output_size: int,
) -> int:
    """Raises for what the real operator refuses, or computes wrongly without a word; returns E_local."""
    name = "dispatch_ffn_combine"
    if x.dim() != 2 or x.dtype not in HALVES:
        raise TypeError(f"{name}: x is {x.dtype} of shape {show(x.shape)}; accepted: float16 or bfloat16 [T, hidden]")
    if known(x.shape[1] % 32 != 0):
        raise ValueError(f"{name}: x has hidden size {x.shape[1]}; accepted: a multiple of 32")
    if not 2 <= ep_size <= 32:
        raise ValueError(f"{name}: ep_size is {ep_size}; accepted: 2 to 32")
    if not group:
        raise ValueError(f"{name}: group is ''; accepted: the name of a communicator that nothing else uses")
    if max_output_size < 1:
        raise ValueError(f"{name}: max_output_size is {max_output_size}; accepted: 1 or more")
    if not w13 or w13[0].dim() != (3 if len(w13) == 1 else 2):
        raise ValueError(f"{name}: w13 is not one tensor [E, hidden, 2I] nor a list of two or more [hidden, 2I]")
    local, hidden, double = w13[0].shape[0] if len(w13) == 1 else len(w13), x.shape[1], w13[0].shape[-1]
    if known(local == 2):
        raise ValueError(
            f"{name}: w13 holds 2 experts; accepted: 1, or 3 or more, as the 16-bit kernel skips SwiGLU for 2"
        )
    if known(double % 2 != 0):
        raise ValueError(f"{name}: w13 has {double} columns; accepted: an even number, gate and up")
    check_per_expert(name, "w13", w13, local, (hidden, double), (x.dtype,))
    check_per_expert(name, "w2", w2, local, (double // 2, hidden), (x.dtype,))
    if ids.dtype != torch.int32 or ids.dim() != 2 or differ(ids.shape[:1], x.shape[:1]):
        raise TypeError(f"{name}: ids is {ids.dtype} of shape {show(ids.shape)}; accepted: int32 [T, k]")
    if known(ids.shape[1] < 1) or known(ids.shape[1] > ep_size * local):
        raise ValueError(f"{name}: ids has k = {ids.shape[1]}; accepted: 1 to {ep_size * local}, the number of experts")
    if weights.dtype != torch.float32 or differ(weights.shape, ids.shape):
        raise TypeError(
            f"{name}: weights is {weights.dtype} of shape {show(weights.shape)}; accepted: float32 like ids"
        )
    return local


def _fake(
    x: Tensor,
    w13: Sequence[Tensor],
    w2: Sequence[Tensor],
    ids: Tensor,
    weights: Tensor,
    group: str,
    ep_size: int,
    max_output_size: int,
) -> tuple[Tensor, Tensor]:
    local = _check(x, w13, w2, ids, weights, group, ep_size, max_output_size)
    return x.new_empty(x.shape), x.new_empty((local,), dtype=torch.int32)


def _cpu(
    x: Tensor,
    w13: Sequence[Tensor],
    w2: Sequence[Tensor],
    ids: Tensor,
    weights: Tensor,
    group: str,
    ep_size: int,
    max_output_size: int,
) -> tuple[Tensor, Tensor]:
    """The same over gloo. Outputs of both matmuls pass through float16, for bfloat16 too, as in the kernel's source.

    Rows past ``max_output_size`` raise on all ranks; the real operator drops them silently.
    """
    local = _check(x, w13, w2, ids, weights, group, ep_size, max_output_size)
    name, top_k = "dispatch_ffn_combine", ids.shape[1]
    ep = open_group(name, "ep", group, ep_size)
    limit = f"max_output_size, {max_output_size}"
    received = exchange(
        name, x, None, ids, None, local * ep_size, ep, ALONE,
        limit=max_output_size, limit_name=limit, max_tokens=0, equal_tokens=False,
    )  # fmt: skip
    numbers = received.counts.tolist()
    hidden = grouped_matmul(received.rows, numbers, w13, (), torch.float16)
    hidden = activate(hidden, "swiglu", 0.0, 0.0, False, x.dtype)
    rows = grouped_matmul(hidden, numbers, w2, (), torch.float16)
    returned, slots = send_back(name, rows.to(x.dtype), received.handle, top_k, ids.numel(), ep)
    return weighted_sum(name, returned, slots, weights, None), received.counts.to(torch.int32)


def _npu(
    x: Tensor,
    w13: Sequence[Tensor],
    w2: Sequence[Tensor],
    ids: Tensor,
    weights: Tensor,
    group: str,
    ep_size: int,
    max_output_size: int,
) -> tuple[Tensor, Tensor]:
    """Calls the provider. Its returns are not used: they are ``out`` and ``expert_token_nums`` once more.

    Raises:
        RuntimeError: no provider is installed.
    """
    local = _check(x, w13, w2, ids, weights, group, ep_size, max_output_size)
    if not hasattr(torch.ops._C_ascend, "dispatch_ffn_combine"):
        raise RuntimeError(
            "dispatch_ffn_combine: torch.ops._C_ascend.dispatch_ffn_combine is not there; install vllm-ascend with its "
            "kernels for A3 and import vllm_ascend.vllm_ascend_C before the first call"
        )
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    numbers = x.new_empty((local,), dtype=torch.int32)
    no_scale, no_bias = x.new_empty((0,), dtype=torch.int64), x.new_empty((0,), dtype=torch.float32)
    torch.ops._C_ascend.dispatch_ffn_combine(
        x=x.contiguous(),
        weight1=list(w13),
        weight2=list(w2),
        expert_idx=ids.clone(memory_format=torch.contiguous_format),
        scale1=[no_scale],
        scale2=[no_scale],
        bias1=[no_bias],
        bias2=[no_bias],
        probs=weights.contiguous(),
        group=group,
        max_output_size=max_output_size,
        out=out,
        expert_token_nums=numbers,
    )
    return out, numbers


register(SCHEMA, cpu=_cpu, fake=_fake, npu=_npu, side_effect=True)
