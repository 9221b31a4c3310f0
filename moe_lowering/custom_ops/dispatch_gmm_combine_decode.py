"""``dispatch_gmm_combine_decode``: a functional wrapper of the fused operator for decode, vllm-ascend's mode 2.

``_C_ascend::dispatch_gmm_combine_decode`` was there from 0.13 to 0.23. W8A8; with 16-bit weights since 2026-02-12. It
allocates its results. Experts lie in blocks: rank r holds ``[r * E_local, (r + 1) * E_local)``; no shared-expert ranks.
A mask is True for the first n tokens; the CPU kernel refuses others, which a device would misread.
``expert_token_nums`` [E_local] int64 counts the rows of each local expert from all ranks. SwiGLU without a limit.

``global_bs`` 0 says that T is equal on all ranks; otherwise it is ep_size times the largest T. Every rank of the group
must call it equally often. The sizes that a device takes are in limits/data, and are not checked here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic

import torch
from torch import Tensor
from typing_extensions import NamedTuple

from moe_lowering.custom_ops.exchange import Group, gather_numbers, open_group
from moe_lowering.custom_ops.fused import (
    HALVES,
    ExpertTensors,
    check_experts,
    check_form,
    check_group,
    check_known,
    check_local_experts,
    check_mask,
    check_tokens,
    check_top_k,
    find_provider_operator,
    run_layer,
    unify_tokens,
    zero_masked_rows,
)
from moe_lowering.custom_ops.library import Value, register, schema_of
from moe_lowering.custom_ops.sizes import smaller
from moe_lowering.custom_ops.token_exchange import Bounds
from moe_lowering.vocabulary import EXPERT_FORMATS

NAME = "dispatch_gmm_combine_decode"


class DispatchGmmCombineDecodeCall(NamedTuple, Generic[Value]):
    """The arguments of ``dispatch_gmm_combine_decode``; of tokens as in ``fused.FusedCall``, of experts as in
    ``fused.ExpertTensors``. ``num_experts`` are those of all ranks; ``global_bs``: see the top of this file."""

    x: Value
    w13: Sequence[Value]
    w2: Sequence[Value]
    ids: Value
    weights: Value
    group: str
    ep_size: int
    ep_rank: int
    num_experts: int
    w13_scale: Sequence[Value] | None = None
    w2_scale: Sequence[Value] | None = None
    mask: Value | None = None
    global_bs: int = 0


SCHEMA = schema_of(NAME, DispatchGmmCombineDecodeCall, "(Tensor y, Tensor expert_token_nums)")
MOST_RANKS = 768  # of the MC2 dispatch that it holds, on A3. Source: ops_transformer.dispatch_tiling
SCALES = (torch.float32, torch.bfloat16, torch.float16)
EQUAL = "global_bs is 0, which says that T is equal on all ranks (ep_size times the largest T says that it may differ)"


def _check(call: DispatchGmmCombineDecodeCall[Tensor]) -> ExpertTensors:
    """Raises for what the real operator refuses, but for the sizes of a device.

    Sources: vllm_ascend.decode_tiling, vllm_ascend.decode_definition.
    """
    experts = ExpertTensors.of("w8a8" if call.w13 and call.w13[0].dtype == torch.int8 else "none", call)
    ep_size, ep_rank, global_bs = call.ep_size, call.ep_rank, call.global_bs
    check_tokens(NAME, call, HALVES)
    check_group(NAME, call.group, ep_size, MOST_RANKS)
    if not 0 <= ep_rank < ep_size:
        raise ValueError(f"{NAME}: ep_rank is {ep_rank}; accepted: 0 to {ep_size - 1}")
    check_form(NAME, experts)
    check_local_experts(NAME, experts, call.num_experts, ep_size)
    check_experts(NAME, experts, call.x, SCALES)
    check_top_k(NAME, call.ids, call.num_experts)
    check_mask(NAME, call, (torch.bool,))
    if global_bs < 0 or global_bs % ep_size:
        raise ValueError(
            f"{NAME}: global_bs is {global_bs}; accepted: 0 (T is equal on all ranks) or a multiple of ep_size, {ep_size}"
        )
    return experts


def _fake(call: DispatchGmmCombineDecodeCall[Tensor]) -> tuple[Tensor, Tensor]:
    experts = _check(call)
    unify_tokens(call)
    return call.x.new_empty(call.x.shape), call.x.new_empty((experts.local,), dtype=torch.int64)


def _cpu(call: DispatchGmmCombineDecodeCall[Tensor]) -> tuple[Tensor, Tensor]:
    """The same over gloo, with the roundings of the operators that it stands for: dispatch, matmul, SwiGLU with
    quantisation, matmul, combine. vllm-ascend's own test compares it with those."""
    experts = _check(call)
    ep = open_group(NAME, "ep", call.group, call.ep_size)
    if ep.rank != call.ep_rank:
        raise ValueError(
            f"{NAME}: ep_rank is {call.ep_rank}; accepted: {ep.rank}, this rank's index in group {call.group!r}"
        )
    _prefix_masks(call.mask, ep)
    most = call.global_bs // call.ep_size or call.x.shape[0]
    bounds = Bounds(
        rows=call.ep_size * most * smaller(call.ids.shape[1], experts.local),
        rows_name="what global_bs allows",
        max_tokens=call.global_bs // call.ep_size,
        equal_tokens=False if call.global_bs else EQUAL,
    )
    between = torch.float32 if EXPERT_FORMATS[experts.quantisation].quantised else call.x.dtype
    return run_layer(NAME, call, experts, ep, between=between, limit=0.0, bounds=bounds)


def _prefix_masks(mask: Tensor | None, ep: Group) -> None:
    """The operator sends the first n tokens, n the number of True in the mask: another mask raises, on all ranks alike."""
    broken = mask is not None and not bool(mask[: int(mask.sum())].all())
    ranks = gather_numbers(torch.tensor([int(broken)]), ep).flatten().nonzero().flatten().tolist()
    if ranks:
        raise ValueError(f"{NAME}: mask is no prefix on EP rank {ranks[0]}; accepted: True for the first n tokens only")


def _npu(call: DispatchGmmCombineDecodeCall[Tensor]) -> tuple[Tensor, Tensor]:
    """Calls the provider.

    Raises:
        RuntimeError: no provider is installed, or one without the operator.
        NotImplementedError: the version that is installed has an argument that is not known here.
    """
    experts, x, mask = _check(call), call.x, call.mask
    operator, names = find_provider_operator(NAME)
    # One 1 in the weights' dtype where there is no scale, as in vllm-ascend's own test (1052917a).
    no_scale, quantised = [x.new_ones((1,))], EXPERT_FORMATS[experts.quantisation].quantised
    arguments = {
        "x": x.contiguous(),
        "expert_ids": call.ids.clone(memory_format=torch.contiguous_format),
        "gmm1_permuted_weight": list(call.w13),
        "gmm1_permuted_weight_scale": experts.in_form(experts.w13_scale) if quantised else no_scale,
        "gmm2_weight": list(call.w2),
        "gmm2_weight_scale": experts.in_form(experts.w2_scale) if quantised else no_scale,
        "expert_scales": call.weights.contiguous(),
        "expert_smooth_scales": None,
        "x_active_mask": None if mask is None else mask.contiguous(),
        "group_ep": call.group,
        "ep_rank_size": call.ep_size,
        "ep_rank_id": call.ep_rank,
        "moe_expert_num": call.num_experts,
        "shared_expert_num": 1,
        "shared_expert_rank_num": 0,
        "quant_mode": 0,
        "global_bs": call.global_bs,
    }
    check_known(NAME, names, arguments)
    y, counts = operator(**arguments)
    return zero_masked_rows(y, mask), counts


register(SCHEMA, DispatchGmmCombineDecodeCall, cpu=_cpu, fake=_fake, npu=_npu, side_effect=True)
