"""What the wrappers of fused MoE operators share: the rules for arguments, a whole layer on CPU, and the provider's operator.

A fused operator sends the tokens, runs both matmuls with SwiGLU (gate first) between them, and combines. Three exist for
Ascend, each in a file of its own: ``dispatch_ffn_combine``, ``dispatch_gmm_combine_decode``, ``mega_moe``. Each is
wrapped as a function: outputs are allocated inside, the ids are handed over as a copy (the operators write into those of
masked tokens), and the rows of masked tokens, which the operators leave undefined, are zero.

Quantised: tokens become int8 before they travel, with a scale each;
matmuls accumulate in int32; the activated values become int8 again, row by row; the sum over k is float32.
Sources: vllm_ascend.ffn_kernel, vllm_ascend.ffn_epilogue: the W8A8 variant; ops_transformer.gmm_swiglu_quant: its formula.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_lowering.custom_ops.combine import send_back, weighted_sum
from moe_lowering.custom_ops.exchange import ALONE, Group
from moe_lowering.custom_ops.expert_matmul import grouped_matmul
from moe_lowering.custom_ops.grouped_mlp import activate, check_per_expert
from moe_lowering.custom_ops.missing_operators import why_absent
from moe_lowering.custom_ops.placement import Placement
from moe_lowering.custom_ops.quantised import WEIGHT_DTYPES, quantise_rows, quantised_matmul
from moe_lowering.custom_ops.sizes import are_certainly_different, is_known, show, unify
from moe_lowering.custom_ops.token_exchange import Bounds, TokenBatch, exchange
from moe_lowering.vocabulary import EXPERT_FORMATS

HALVES = (torch.float16, torch.bfloat16)
FORMATS = ("none", "w8a8", "w4a8")  # those that the fused operators compute
Tensors = Sequence[Tensor]


class FusedCall(Protocol):
    """The arguments that all of the fused operators have: x [T, hidden], ids and weights [T, k], mask [T] or None."""

    @property
    def x(self) -> Tensor: ...

    @property
    def ids(self) -> Tensor: ...

    @property
    def weights(self) -> Tensor: ...

    @property
    def mask(self) -> Tensor | None: ...


@dataclasses.dataclass(frozen=True)
class ExpertTensors:
    """The weights of one rank's experts. Every list is one stacked tensor or one tensor for each expert; () for none.

    w13 [E_local, hidden, 2I], w2 [E_local, I, hidden], in int32 an eighth as wide for w4a8; scales and scale biases are
    as wide as the matrices, without their first axis.
    """

    quantisation: str
    w13: Tensors
    w2: Tensors
    w13_scale: Tensors = ()
    w2_scale: Tensors = ()
    w13_scale_bias: Tensors = ()
    w2_scale_bias: Tensors = ()

    @staticmethod
    def of(quantisation: str, call: Any) -> ExpertTensors:
        """The lists of a fused operator's call, by their names; lists that the operator has no argument for are empty."""
        names = (field.name for field in dataclasses.fields(ExpertTensors) if field.name != "quantisation")
        return ExpertTensors(quantisation, **{name: getattr(call, name, None) or () for name in names})

    @property
    def stacked(self) -> bool:
        return len(self.w13) == 1 and self.w13[0].dim() == 3

    @property
    def local(self) -> int:
        """E_local."""
        return self.w13[0].shape[0] if self.stacked else len(self.w13)

    @property
    def packed(self) -> int:
        """Weights in one element."""
        return EXPERT_FORMATS[self.quantisation].packed

    @property
    def intermediate(self) -> int:
        """I, of numbers and not of elements that hold several."""
        return self.w13[0].shape[-1] * self.packed // 2

    def in_form(self, tensors: Tensors, change: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> list[Tensor]:
        """Scales or scale biases as one tensor or as a list, whichever the weights are, each changed by ``change``."""
        changed = [change(tensor) for tensor in tensors]
        if self.stacked == (changed[0].dim() == 2):
            return changed
        return [torch.stack(changed)] if self.stacked else list(changed[0].unbind(0))


def check_tokens(operator: str, call: FusedCall, dtypes: Sequence[torch.dtype]) -> None:
    """The rules for x [T, hidden], ids [T, k] int32 and the routing weights [T, k] float32."""
    x, ids, weights = call.x, call.ids, call.weights
    if x.dim() != 2 or x.dtype not in dtypes:
        accepted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{operator}: x is {x.dtype} of shape {show(x.shape)}; accepted: {accepted} [T, hidden]")
    if ids.dtype != torch.int32 or ids.dim() != 2 or are_certainly_different(ids.shape[:1], x.shape[:1]):
        raise TypeError(f"{operator}: ids is {ids.dtype} of shape {show(ids.shape)}; accepted: int32 [T, k]")
    if weights.dtype != torch.float32 or are_certainly_different(weights.shape, ids.shape):
        raise TypeError(
            f"{operator}: weights is {weights.dtype} of shape {show(weights.shape)}; accepted: float32 like ids"
        )


def check_top_k(operator: str, ids: Tensor, experts: int) -> None:
    """A token chooses from 1 to all experts: ids [T, k]."""
    if is_known(ids.shape[1] < 1) or is_known(ids.shape[1] > experts):
        raise ValueError(f"{operator}: ids has k = {ids.shape[1]}; accepted: 1 to {experts}, the number of experts")


def check_group(operator: str, group: str, ep_size: int, most: int) -> None:
    """There is a communicator, and its ranks are as many as the operator takes."""
    if not 2 <= ep_size <= most:
        raise ValueError(f"{operator}: ep_size is {ep_size}; accepted: 2 to {most}")
    if not group:
        raise ValueError(f"{operator}: group is ''; accepted: the name of a communicator that nothing else uses")


def check_mask(operator: str, call: FusedCall, dtypes: Sequence[torch.dtype]) -> None:
    """The rules for the mask [T], where there is one."""
    mask = call.mask
    if mask is not None and (mask.dtype not in dtypes or are_certainly_different(mask.shape, call.x.shape[:1])):
        accepted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{operator}: mask is {mask.dtype} of shape {show(mask.shape)}; accepted: {accepted} [T]")


def check_limit(operator: str, name: str, limit: float) -> None:
    """The limit of clamps is 0, for none, or positive, and no NaN."""
    if not limit >= 0:
        raise ValueError(f"{operator}: {name} is {limit}; accepted: 0 (no limit) or more")


def check_local_experts(operator: str, experts: ExpertTensors, num_experts: int, ep_size: int) -> None:
    """The weights are those of num_experts / ep_size experts."""
    if num_experts < 1 or num_experts % ep_size:
        raise ValueError(f"{operator}: num_experts is {num_experts}; accepted: a multiple of ep_size, {ep_size}")
    if is_known(experts.local != num_experts // ep_size):
        raise ValueError(
            f"{operator}: w13 holds {experts.local} experts; accepted: {num_experts // ep_size}, num_experts / ep_size"
        )


def check_quantisation(operator: str, quantisation: str) -> None:
    """The word, before anything is looked up by it."""
    if quantisation not in FORMATS:
        raise ValueError(f"{operator}: quantisation is {quantisation!r}; accepted: {', '.join(map(repr, FORMATS))}")


def check_form(operator: str, experts: ExpertTensors, *, lists_only: bool = False) -> None:
    """Whether w13 and w2 are both stacked, or both a list: the kernels take the form of both from w13.

    Args:
        lists_only: one matrix for each expert, also for one expert. Without it a list of one holds all experts.
    """
    dims = [[w.dim() for w in weights] for weights in (experts.w13, experts.w2)]
    if lists_only:
        if not dims[0] or set(dims[0]) != {2}:
            raise ValueError(f"{operator}: w13 is not a list with one [hidden, 2I] for each expert")
    elif dims[0] != [3] and (len(dims[0]) < 2 or set(dims[0]) != {2}):
        raise ValueError(f"{operator}: w13 is not one tensor [E, hidden, 2I] nor a list of two or more [hidden, 2I]")
    if dims[0] != dims[1]:
        raise ValueError(
            f"{operator}: w13 and w2 are not both one tensor or both a list of {len(dims[0])}; accepted: the same form"
        )


def check_experts(operator: str, experts: ExpertTensors, x: Tensor, scale_dtypes: Sequence[torch.dtype]) -> None:
    """The rules for shapes and dtypes of weights (``check_form`` first), scales and scale biases."""
    quantisation, packed, hidden = experts.quantisation, experts.packed, x.shape[1]
    width = experts.w13[0].shape[-1] * packed
    if is_known(width % 2 != 0):
        raise ValueError(f"{operator}: w13 has {width} columns; accepted: an even number, gate and up")
    if is_known(hidden % packed != 0):
        raise ValueError(f"{operator}: x has hidden size {hidden}; accepted: a multiple of {packed}")
    dtypes = (WEIGHT_DTYPES.get(quantisation, x.dtype),)
    check_per_expert(operator, "w13", experts.w13, experts.local, (hidden, width // packed), dtypes)
    check_per_expert(operator, "w2", experts.w2, experts.local, (width // 2, hidden // packed), dtypes)
    sizes = {"w13": width, "w2": hidden}
    for name, size in sizes.items():
        for kind, expected, accepted in (
            ("scale", EXPERT_FORMATS[quantisation].quantised, scale_dtypes),
            ("scale_bias", EXPERT_FORMATS[quantisation].has_scale_bias, (torch.float32,)),
        ):
            tensors = getattr(experts, f"{name}_{kind}")
            if bool(tensors) != expected:
                raise ValueError(
                    f"{operator}: {name}_{kind} is {'given' if tensors else 'None'} for quantisation {quantisation!r}; "
                    f"accepted: {show((experts.local, size)) if expected else 'None'}"
                )
            if expected:
                check_per_expert(operator, f"{name}_{kind}", tensors, experts.local, (size,), accepted)


def unify_tokens(call: FusedCall) -> None:
    """One symbol for T in all arguments, for fake kernels."""
    for tensor in (call.ids, call.weights, call.mask):
        if tensor is not None:
            unify(tensor.shape[:1], call.x.shape[:1])


# ------------------------------------------------------------------------------------------------------------ arithmetic


def wide_scale(scale: Tensor) -> Tensor:
    """Scales as the operators read them: int64 with the bits of the float32 in the low half, nothing in the high one."""
    if scale.dtype == torch.int64:
        return scale
    return scale.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def run_layer(
    operator: str,
    call: FusedCall,
    experts: ExpertTensors,
    ep: Group,
    *,
    between: torch.dtype,
    limit: float,
    bounds: Bounds,
) -> tuple[Tensor, Tensor]:
    """The whole layer over a process group: y [T, hidden] in the dtype of x, counts [E_local] int64.

    Args:
        between: dtype in which both matmuls' results pass from the cube to the vector cores, when quantised after the
            scale of the column and before that of the row.
        limit: of SwiGLU's inputs, 0 for none: gate at most ``limit``, up within ``[-limit, limit]``.

    Raises:
        ValueError, RuntimeError: as ``exchange`` does, on all ranks alike.
    """
    x, ids = call.x, call.ids
    quantised = EXPERT_FORMATS[experts.quantisation].quantised
    sent, scale = quantise_rows(x) if quantised else (x, None)
    active = None if call.mask is None else call.mask.bool()
    placement = Placement(experts.local * ep.size, ep.size)
    received = exchange(operator, TokenBatch(sent, ids, scale, active), placement, ep, ALONE, bounds)
    numbers, (name, bound) = received.counts.tolist(), ("swiglu_clamp", limit) if limit else ("swiglu", 0.0)
    if quantised:
        assert received.scale is not None
        hidden = quantised_matmul(received.rows, received.scale, numbers, experts.w13, experts.w13_scale, between)
        again, scale = quantise_rows(activate(hidden, name, bound, 0.0, False, torch.float32))
        result = quantised_matmul(again, scale, numbers, experts.w2, experts.w2_scale, between)
    else:
        hidden = grouped_matmul(received.rows, numbers, experts.w13, (), between)
        hidden = activate(hidden, name, bound, 0.0, False, x.dtype)
        result = grouped_matmul(hidden, numbers, experts.w2, (), between)
    kept = None if active is None else active.nonzero().squeeze(1)
    expected = ids.numel() if kept is None else kept.numel() * ids.shape[1]
    returned, slots = send_back(operator, result.to(x.dtype), received.handle, ids.shape[1], expected, ep)
    return weighted_sum(operator, returned, slots, call.weights, kept), received.counts


# -------------------------------------------------------------------------------------------------------------- provider


def find_provider_operator(operator: str) -> tuple[Any, frozenset[str]]:
    """vllm-ascend's operator of that name, and the names of its arguments, which differ between versions.

    Raises:
        RuntimeError: it is not there, and why: no provider, one that has no such operator, one that was not imported.
    """
    if not hasattr(torch.ops._C_ascend, operator):
        raise RuntimeError(f"{operator}: {why_absent(operator)}")
    overload = getattr(torch.ops._C_ascend, operator).default
    return overload, frozenset(argument.name for argument in overload._schema.arguments)


def check_known(operator: str, names: Collection[str], passed: Collection[str]) -> None:
    """Refuse an operator that has an argument which its wrapper does not know, whatever the default is.

    ``world_size`` of dispatch_ffn_combine came with a default that the operator itself refuses.

    Raises:
        NotImplementedError: naming the arguments.
    """
    if unknown := sorted(set(names) - set(passed)):
        raise NotImplementedError(
            f"{operator}: the operator that is registered has {', '.join(unknown)}, which this version of moe_lowering does "
            "not know; accepted: the versions of vllm-ascend in docs/provider.md"
        )


def zero_masked_rows(y: Tensor, mask: Tensor | None) -> Tensor:
    """y with the rows of masked tokens zero, whatever the operator left there."""
    return y if mask is None else torch.where(mask.bool().unsqueeze(1), y, y.new_zeros(()))
