"""``mega_moe``: a functional wrapper of CANN's fused operator, the successor of ``dispatch_ffn_combine``.

``cann_ops_transformer.ops.mega_moe`` (CANN 9.1) in bfloat16, W8A8 and W4A8. It works on a symmetric
buffer, which ``get_symm_buffer_for_mega_moe`` makes together with all ranks of the group: the wrapper makes it once for
each group and set of sizes, at the first call. So a graph can be captured after a run without capture, and every size must
be the same on all ranks, as must T (A2, A3).

Weights are lists with one matrix for each expert. ``max_tokens`` bounds T; ``max_rows`` the rows that a rank receives, 0
for what ``max_tokens`` implies. ``expert_token_nums`` [E_local] int32 counts the rows of each local expert from all ranks.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any, Generic

import torch
from torch import Tensor
from typing_extensions import NamedTuple

from moe_lowering.custom_ops.exchange import open_group
from moe_lowering.custom_ops.fused import (
    ExpertTensors,
    check_experts,
    check_form,
    check_group,
    check_limit,
    check_local_experts,
    check_mask,
    check_quantisation,
    check_tokens,
    check_top_k,
    run_layer,
    unify_tokens,
    wide_scale,
    zero_masked_rows,
)
from moe_lowering.custom_ops.library import Value, register, schema_of
from moe_lowering.custom_ops.sizes import is_known, smaller
from moe_lowering.custom_ops.token_exchange import Bounds
from moe_lowering.vocabulary import EXPERT_FORMATS

NAME = "mega_moe"


class MegaMoeCall(NamedTuple, Generic[Value]):
    """The arguments of ``mega_moe``; of tokens as in ``fused.FusedCall``, of experts as in ``fused.ExpertTensors``.

    ``num_experts`` are those of all ranks; ``max_tokens`` and ``max_rows``: see the top of this file; ``activation_clamp``
    limits SwiGLU's inputs, 0 for none.
    """

    x: Value
    w13: Sequence[Value]
    w2: Sequence[Value]
    ids: Value
    weights: Value
    group: str
    ep_size: int
    num_experts: int
    max_tokens: int
    max_rows: int
    quantisation: str = "none"
    w13_scale: Sequence[Value] | None = None
    w2_scale: Sequence[Value] | None = None
    w13_scale_bias: Sequence[Value] | None = None
    w2_scale_bias: Sequence[Value] | None = None
    mask: Value | None = None
    activation_clamp: float = 0.0


SCHEMA = schema_of(NAME, MegaMoeCall, "(Tensor y, Tensor expert_token_nums)")
PROVIDER = "cann_ops_transformer.ops"
MOST_RANKS = 128
SCALES = (torch.float32, torch.int64)
MASKS = (torch.bool, torch.int8)
DISPATCH_QUANT = {"none": (0, None), "w8a8": (2, torch.int8), "w4a8": (2, torch.int8)}
EQUAL = "the operator wants the same T on all ranks"
# Versions that have this argument read intermediate_hidden and packed int4 weights as this wrapper gives them.
PRESENT_FORM = "topk_weights_type"

# By process group and sizes. The group is kept too: otherwise another group could get its id, and its buffer.
_BUFFERS: dict[tuple[Any, ...], Any] = {}


def _check(call: MegaMoeCall[Tensor]) -> ExpertTensors:
    """Raises for what the real operator refuses, or does not say that it accepts, but for the sizes of a device."""
    x, max_tokens = call.x, call.max_tokens
    check_tokens(NAME, call, (torch.bfloat16,))
    check_group(NAME, call.group, call.ep_size, MOST_RANKS)
    check_quantisation(NAME, call.quantisation)
    experts = ExpertTensors.of(call.quantisation, call)
    check_form(NAME, experts, lists_only=True)
    check_local_experts(NAME, experts, call.num_experts, call.ep_size)
    check_experts(NAME, experts, x, SCALES)
    check_top_k(NAME, call.ids, call.num_experts)
    check_mask(NAME, call, MASKS)
    check_limit(NAME, "activation_clamp", call.activation_clamp)
    if max_tokens < 1:
        raise ValueError(f"{NAME}: max_tokens is {max_tokens}; accepted: 1 or more")
    if is_known(x.shape[0] > max_tokens):
        raise ValueError(f"{NAME}: x has {x.shape[0]} tokens; accepted: at most max_tokens, {max_tokens}")
    if call.max_rows < 0:
        raise ValueError(f"{NAME}: max_rows is {call.max_rows}; accepted: 0 (what max_tokens implies) or more")
    return experts


def _row_bound(call: MegaMoeCall[Tensor], experts: ExpertTensors) -> int:
    """Rows that a rank may receive. Never 0: some versions divide by it."""
    return call.max_rows or call.ep_size * call.max_tokens * smaller(call.ids.shape[1], experts.local)


def _fake(call: MegaMoeCall[Tensor]) -> tuple[Tensor, Tensor]:
    experts = _check(call)
    unify_tokens(call)
    return call.x.new_empty(call.x.shape), call.x.new_empty((experts.local,), dtype=torch.int32)


def _cpu(call: MegaMoeCall[Tensor]) -> tuple[Tensor, Tensor]:
    """The same over gloo, with the roundings of ``dispatch_ffn_combine``, whose kernels the operator took over."""
    experts = _check(call)
    rows, ep = _row_bound(call, experts), open_group(NAME, "ep", call.group, call.ep_size)
    bounds = Bounds(rows, f"{rows} (max_rows is {call.max_rows})", call.max_tokens, EQUAL)
    y, counts = run_layer(NAME, call, experts, ep, between=torch.float16, limit=call.activation_clamp, bounds=bounds)
    return y, counts.to(torch.int32)


def _npu(call: MegaMoeCall[Tensor]) -> tuple[Tensor, Tensor]:
    """Calls the provider; the first call for a group and its sizes is a collective that makes the buffer.

    Raises:
        RuntimeError: no provider is installed.
        NotImplementedError: W4A8 with a provider that takes other packed weights.
        ValueError: ``group`` names no communicator here.
    """
    experts, form = _check(call), EXPERT_FORMATS[call.quantisation]
    provider = _provider()
    present = PRESENT_FORM in inspect.signature(provider.get_symm_buffer_for_mega_moe).parameters
    if form.has_scale_bias and not present:
        raise NotImplementedError(
            f"{NAME}: quantisation is 'w4a8', and get_symm_buffer_for_mega_moe has no argument {PRESENT_FORM}: this version "
            "of cann_ops_transformer reads two int4 in an int8; accepted: a newer one, which reads eight in an int32"
        )
    sizes = {
        "num_experts": call.num_experts,
        "num_max_tokens_per_rank": call.max_tokens,
        "num_topk": int(call.ids.shape[1]),
        "hidden": int(call.x.shape[1]),
        # vllm-ascend 182b75ea passes both halves; the later documentation defines the width after SwiGLU.
        "intermediate_hidden": experts.intermediate * (1 if present else 2),
        "max_recv_token_num": _row_bound(call, experts),
        "dispatch_quant_mode": DISPATCH_QUANT[call.quantisation][0],
        "dispatch_quant_out_dtype": DISPATCH_QUANT[call.quantisation][1],
    }
    quantised, biased = form.quantised, form.has_scale_bias
    y, counts = provider.mega_moe(
        call.x.contiguous(),
        call.ids.clone(memory_format=torch.contiguous_format),
        call.weights.contiguous(),
        list(call.w13),
        list(call.w2),
        _buffer(provider, call.group, call.ep_size, sizes),
        l1_weights_sf=experts.in_form(experts.w13_scale, wide_scale) if quantised else None,
        l2_weights_sf=experts.in_form(experts.w2_scale, wide_scale) if quantised else None,
        l1_bias=experts.in_form(experts.w13_scale_bias) if biased else None,
        l2_bias=experts.in_form(experts.w2_scale_bias) if biased else None,
        x_active_mask=None if call.mask is None else call.mask.to(torch.int8).contiguous(),
        activation="swiglu",
        activation_clamp=float(call.activation_clamp) if call.activation_clamp else None,
    )
    return zero_masked_rows(y, call.mask), counts


def _provider() -> Any:
    try:
        return importlib.import_module(PROVIDER)
    except ImportError as error:
        raise RuntimeError(
            f"{NAME}: {PROVIDER} cannot be imported ({error}); install cann_ops_transformer, which comes "
            "with CANN 9.1 (no package index has it)"
        ) from error


def _buffer(provider: Any, group: str, ep_size: int, sizes: dict[str, Any]) -> Any:
    """The symmetric buffer of a group for these sizes; made by a collective the first time."""
    handle = _process_group(group, ep_size)
    key = (handle, *sizes.items())
    if key not in _BUFFERS:
        _BUFFERS[key] = provider.get_symm_buffer_for_mega_moe(handle, **sizes)
    return _BUFFERS[key]


def _process_group(name: str, ep_size: int) -> Any:
    """The process group of that name, or the one whose HCCL communicator, which MC2 operators take, has that name.

    Raises:
        ValueError: there is none, or it has another number of ranks.
    """
    from torch.distributed import distributed_c10d as c10d

    for handle in list(c10d._world.pg_map):
        if _communicator(handle) == name:
            break
    else:
        return open_group(NAME, "ep", name, ep_size).handle
    if handle.size() != ep_size:
        raise ValueError(f"{NAME}: ep_size is {ep_size}, but group {name!r} has {handle.size()} ranks")
    return handle


def _communicator(handle: Any) -> str | None:
    """The name of a process group's HCCL communicator; None when it has none, or none yet."""
    import torch.distributed as dist

    try:
        backend = handle._get_backend(torch.device("npu"))
        return backend.get_hccl_comm_name(dist.get_rank(handle), init_comm=False)
    except (RuntimeError, AttributeError, TypeError):
        return None


register(SCHEMA, MegaMoeCall, cpu=_cpu, fake=_fake, npu=_npu, side_effect=True)
