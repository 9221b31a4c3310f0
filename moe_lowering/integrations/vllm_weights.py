"""The experts' tensors of a layer, as vllm-ascend keeps them when they are loaded, in the words of ``moe_experts``.

``SCHEMES`` has a row for each way of vllm-ascend to keep experts that this package computes with. Nothing is copied: the tensors
are the layer's own. Sources, of vllm-ascend 0.23.0: ``ops/fused_moe/fused_moe.py`` (unquantised),
``quantization/methods/w8a8_dynamic.py``, ``quantization/methods/w4a8.py``, ``utils.py`` (``maybe_trans_nz``).
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from moe_lowering.integrations.vllm_refusals import refuse
from moe_lowering.passes.operands import ND, NZ, ExpertOperands, Operands


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a method of vllm-ascend keeps the experts.

    Attributes:
        quantisation: the word of ``moe_experts``.
        tensors: attributes of the layer, by the names of ``moe_experts``: w13 [E_local, H, 2I], w2 [E_local, I, H], scales and
            scale biases [E_local, 2I] and [E_local, H].
        is_nz: whether the weights are FRACTAL_NZ, from vllm-ascend's configuration and the model's dtype; and what says so.
    """

    quantisation: str
    tensors: Mapping[str, str]
    is_nz: Callable[[Any, Any], tuple[bool, str]]


def _plain_is_nz(ascend_config: Any, dtype: Any) -> tuple[bool, str]:
    if int(ascend_config.enable_fused_mc2):
        return True, "additional_config.enable_fused_mc2 casts weights to FRACTAL_NZ"
    halves = str(dtype) in ("torch.bfloat16", "torch.float16")
    return halves and int(ascend_config.weight_nz_mode) == 2, "unquantised weights and additional_config.weight_nz_mode"


def _w8a8_is_nz(ascend_config: Any, dtype: Any) -> tuple[bool, str]:
    return True, "W8A8 weights, which vllm-ascend casts to FRACTAL_NZ"


def _w4a8_is_nz(ascend_config: Any, dtype: Any) -> tuple[bool, str]:
    return bool(ascend_config.weight_nz_mode), "W4A8 weights and additional_config.weight_nz_mode"


_WEIGHTS = {"w13": "w13_weight", "w2": "w2_weight"}
# By the class of the method, which for a quantised layer is that of the scheme within AscendFusedMoEMethod.
SCHEMES = {
    "AscendUnquantizedFusedMoEMethod": Scheme("none", _WEIGHTS, _plain_is_nz),
    "AscendW8A8DynamicFusedMoEMethod": Scheme(
        "w8a8", {**_WEIGHTS, "w13_scale": "w13_weight_scale_fp32", "w2_scale": "w2_weight_scale"}, _w8a8_is_nz
    ),
    "AscendW4A8DynamicFusedMoEMethod": Scheme(
        "w4a8",
        {
            **_WEIGHTS,
            "w13_scale": "w13_weight_scale",
            "w2_scale": "w2_weight_scale",
            "w13_scale_bias": "w13_scale_bias",
            "w2_scale_bias": "w2_scale_bias",
        },
        _w4a8_is_nz,
    ),
}


def scheme_of(layer: Any) -> Scheme:
    """The row of a layer's method.

    Raises:
        Refused: a method without one; scales of groups of a column.
    """
    method = layer.quant_method
    name = type(getattr(method, "quant_method", method)).__name__
    if name not in SCHEMES:
        raise refuse("quantisation", "the quantisation method", name, ", ".join(SCHEMES))
    scheme = SCHEMES[name]
    for argument, attribute in scheme.tensors.items():
        tensor = getattr(layer, attribute, None)
        if tensor is None:
            raise refuse("weight_lists", f"the layer's {attribute}", "not there", "one tensor of all experts")
        if argument.endswith("_scale") and tensor.dim() != 2 and not _is_one_group(tensor):
            accepted = "one scale for each column, [experts, columns] (group_size 0)"
            raise refuse("scale_groups", f"the layer's {attribute}", f"of shape {list(tensor.shape)}", accepted)
    return scheme


def _is_one_group(scale: Tensor) -> bool:
    """[experts, 1, columns], as vllm-ascend keeps some scales of whole columns."""
    return scale.dim() == 3 and scale.shape[1] == 1


def tensors_of(layer: Any, scheme: Scheme) -> dict[str, Tensor]:
    """The layer's tensors by the names of ``moe_experts``."""
    tensors = {name: getattr(layer, attribute) for name, attribute in scheme.tensors.items()}
    return {name: t.squeeze(1) if name.endswith("_scale") and _is_one_group(t) else t for name, t in tensors.items()}


def operands_of(tensors: Mapping[str, Tensor]) -> ExpertOperands:
    """What the pass's rules read of them, as of inputs of a graph; the same on every rank, whatever its device."""
    stored = {name: Operands.of([(tensor.detach().to("meta"), True)]) for name, tensor in tensors.items()}
    return ExpertOperands(**stored)


def weight_format_of(layer: Any, scheme: Scheme) -> tuple[str, str]:
    """The memory format of the weights, in the words of ``Deployment``, and what says so."""
    ascend_config = importlib.import_module("vllm_ascend.ascend_config").get_ascend_config()
    is_nz, source = scheme.is_nz(ascend_config, layer.moe_config.in_dtype)
    return NZ if is_nz else ND, source
