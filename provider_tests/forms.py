"""Every form in which the wrappers call vllm-ascend's operators, from the words of the package itself."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from fused_layers import lists_of, make_layer, make_tokens
from torch import Tensor
from torch.utils._pytree import tree_map

from moe_lowering.custom_ops import dispatch_ffn_combine, dispatch_gmm_combine_decode
from moe_lowering.custom_ops.fused import FORMATS, HALVES

FFN, DECODE = dispatch_ffn_combine.NAME, dispatch_gmm_combine_decode.NAME
MODULES = {FFN: dispatch_ffn_combine, DECODE: dispatch_gmm_combine_decode}
RANKS, EXPERTS = 2, 6  # three experts on a rank: two would be refused by the 16-bit kernel
ROWS = 77
NZ, ND = 29, 2  # ACL_FORMAT_FRACTAL_NZ, ACL_FORMAT_ND (acl_base_rt.h)


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to call a wrapper.

    Attributes:
        lists: weights as one tensor for each expert. other_form: scales (and biases) as a list beside stacked weights, and the
            other way round.
        strided: x, weights of the routing and mask are not contiguous. weight_format: of the device (``ND``, ``NZ``).
    """

    operator: str
    quantisation: str
    dtype: torch.dtype = torch.bfloat16
    lists: bool = False
    scale_dtype: torch.dtype = torch.float32
    other_form: bool = False
    masked: bool = False
    limit: float = 0.0
    global_bs: int = 0
    tokens: int = 4
    strided: bool = False
    weight_format: int = ND

    def __str__(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)}".replace("torch.", "")
            for field in dataclasses.fields(self)[2:]
            if getattr(self, field.name) != field.default
        ]
        return "-".join([self.operator, self.quantisation, *changed])


def forms(operator: str) -> list[Form]:
    return list(dict.fromkeys({FFN: ffn_forms, DECODE: decode_forms}[operator]()))


def ffn_forms() -> Iterator[Form]:
    for quantisation in FORMATS:
        quantised = quantisation != "none"
        flags = (False, True) if quantised else (False,)
        for dtype, lists, scale_dtype, other_form, masked, limit in itertools.product(
            (torch.bfloat16,) if quantised else HALVES,
            (False, True),
            dispatch_ffn_combine.SCALES if quantised else (torch.float32,),
            flags,
            flags,
            (0.0, 2.5) if quantised else (0.0,),
        ):
            yield Form(FFN, quantisation, dtype, lists, scale_dtype, other_form, masked, limit)
        yield from _shapes(Form(FFN, quantisation, masked=quantised))


def decode_forms() -> Iterator[Form]:
    for quantisation in ("none", "w8a8"):  # of FORMATS: it knows no int4
        quantised = quantisation != "none"
        for dtype, lists, scale_dtype, other_form, masked, global_bs in itertools.product(
            HALVES,
            (False, True),
            dispatch_gmm_combine_decode.SCALES if quantised else (torch.float32,),
            (False, True) if quantised else (False,),
            (False, True),
            (0, 16),
        ):
            yield Form(DECODE, quantisation, dtype, lists, scale_dtype, other_form, masked, global_bs=global_bs)
        yield from _shapes(Form(DECODE, quantisation, masked=True))


def _shapes(form: Form) -> Iterator[Form]:
    """No token, one, many; not contiguous; weights in the format of the device."""
    for tokens in (0, 1, 33):
        yield dataclasses.replace(form, tokens=tokens)
    yield dataclasses.replace(form, strided=True)
    for lists in (False, True):
        yield dataclasses.replace(form, lists=lists, weight_format=NZ)


def call_of(form: Form, device: str = "npu") -> dict[str, Any]:
    """The wrapper's arguments."""
    layer = make_layer(form.quantisation, EXPERTS, form.dtype)
    x, weights, ids = make_tokens(0, form.tokens, EXPERTS, form.dtype, False)
    call: dict[str, Any] = lists_of(layer, 0, RANKS, form.lists)
    for name in ("w13_scale", "w2_scale", "w13_scale_bias", "w2_scale_bias"):
        if name in call:
            call[name] = [_scale(scale, name, form) for scale in call[name]]
            if form.other_form:
                call[name] = list(call[name][0].unbind()) if len(call[name]) == 1 else [torch.stack(call[name])]
    call.update(x=x, ids=ids, weights=weights)
    if form.masked:
        call["mask"] = torch.arange(form.tokens) < max(form.tokens - 1, 0)
    if form.strided:
        for name in ("x", "ids", "weights", *(("mask",) if form.masked else ())):
            call[name] = torch.stack([call[name], call[name]], -1)[..., 0]
    call = tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, call)
    if form.weight_format == NZ and device == "npu":
        for name in ("w13", "w2"):
            call[name] = [_in_nz(weight) for weight in call[name]]
    call.update(group="mc2", ep_size=RANKS)
    if form.operator == FFN:
        call.update(max_output_size=ROWS, quantisation=form.quantisation, swiglu_limit=form.limit)
    else:
        call.update(ep_rank=1, num_experts=EXPERTS, global_bs=form.global_bs)
    return call


def _scale(scale: Tensor, name: str, form: Form) -> Tensor:
    if name.endswith("bias") or form.scale_dtype == torch.float32:
        return scale
    return scale.view(torch.int32).long() if form.scale_dtype == torch.int64 else scale.to(form.scale_dtype)


def _in_nz(weight: Tensor) -> Tensor:
    """A tensor of FRACTAL_NZ with these sizes; its values do not matter here, as nothing is computed."""
    import torch_npu

    torch.npu.config.allow_internal_format = True  # False by default, and cannot be read
    try:
        return torch_npu.empty_with_format(tuple(weight.shape), dtype=weight.dtype, device="npu", acl_format=NZ)
    finally:
        torch.npu.config.allow_internal_format = False


def call(form: Form, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Through the dispatcher, as a graph calls it."""
    return getattr(torch.ops.moe_lowering, form.operator)(**arguments)
