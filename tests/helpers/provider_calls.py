"""Calls of the wrappers of fused operators, and what is published of the operators that they call."""

from __future__ import annotations

import sys
import types
from importlib import resources
from typing import Any

import torch
from fused_layers import lists_of, make_layer, make_tokens
from torch import Tensor

from moe_lowering.custom_ops import dispatch_ffn_combine, dispatch_gmm_combine_decode, mega_moe
from moe_lowering.custom_ops.dispatch_ffn_combine import DispatchFfnCombineCall
from moe_lowering.custom_ops.dispatch_gmm_combine_decode import DispatchGmmCombineDecodeCall
from moe_lowering.custom_ops.mega_moe import MegaMoeCall

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


PUBLISHED = tomllib.loads((resources.files("moe_lowering.limits") / "schemas.toml").read_text("utf-8"))


EXPERTS = 6


MASK = torch.tensor([True, False, True, True])


CALLS: dict[types.ModuleType, Any] = {
    dispatch_ffn_combine: DispatchFfnCombineCall,
    dispatch_gmm_combine_decode: DispatchGmmCombineDecodeCall,
    mega_moe: MegaMoeCall,
}


def on_npu(wrapper: types.ModuleType, **arguments: Any) -> tuple[Tensor, Tensor]:
    """What the kernel for the device makes of these arguments."""
    return wrapper._npu(CALLS[wrapper](**arguments))


def call_of(operator: str, quantisation: str, *, lists: bool = False, masked: bool = False) -> dict[str, Any]:
    layer = make_layer(quantisation, EXPERTS, torch.bfloat16)
    x, weights, ids = make_tokens(0, 4, EXPERTS, torch.bfloat16, False)
    call = {**lists_of(layer, 0, 2, lists), "x": x, "ids": ids, "weights": weights, "group": "mc2", "ep_size": 2}
    if masked:
        call["mask"] = MASK
    return call


def expect_result(y: Tensor, x: Tensor, masked: bool) -> None:
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert (y[[0, 2, 3]] == 3).all()
    assert (y[1] == 0).all() if masked else y[1].isnan().all()


def bits(scale: Tensor) -> Tensor:
    return scale.view(torch.int32).long()


def equal_lists(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )
