"""CPU kernels of ``npu::`` operators, and of those of libraries that models bring: the documented meaning, with everything
that is undefined made visible.

The kernels accept what the real operators accept (``moe_lowering.limits``; torch_npu's meta functions accept nearly
anything), compute in float32 and round where the real operators round, and fill with NaN, or the smallest integer, what
the real operators leave undefined. No code of the real operators is used; each docstring names the documentation.
"""

from __future__ import annotations

import torch

from moe_lowering.simulator.kernels import clip_quant
from moe_lowering.simulator.kernels.atb import KERNELS as ATB
from moe_lowering.simulator.kernels.common import Kernel, collective, with_limits
from moe_lowering.simulator.kernels.distribute import KERNELS as DISTRIBUTE
from moe_lowering.simulator.kernels.finalize import KERNELS as FINALIZING
from moe_lowering.simulator.kernels.format_cast import KERNELS as FORMAT_CASTS
from moe_lowering.simulator.kernels.gating import KERNELS as GATING
from moe_lowering.simulator.kernels.gating_softmax import KERNELS as GATING_SOFTMAX
from moe_lowering.simulator.kernels.grouped_matmul import KERNELS as GROUPED_MATMUL
from moe_lowering.simulator.kernels.infer_attention import KERNELS as INFER_ATTENTION
from moe_lowering.simulator.kernels.mla import KERNELS as MLA
from moe_lowering.simulator.kernels.norm import KERNELS as NORMS
from moe_lowering.simulator.kernels.permute import KERNELS as PERMUTING
from moe_lowering.simulator.kernels.quantised import KERNELS as QUANTISED
from moe_lowering.simulator.kernels.rotary import KERNELS as ROTARY
from moe_lowering.simulator.kernels.routing import KERNELS as ROUTING
from moe_lowering.simulator.kernels.routing_v1 import KERNELS as ROUTING_V1

LOCAL = {  # the kernels that need no other rank
    **GATING,
    **GATING_SOFTMAX,
    **ROUTING,
    **ROUTING_V1,
    **GROUPED_MATMUL,
    **QUANTISED,
    **PERMUTING,
    **FINALIZING,
    **NORMS,
    **ROTARY,
    **INFER_ATTENTION,
    **FORMAT_CASTS,
    **MLA,
}
_LIBRARY: list[torch.library.Library] = []


def register() -> None:
    """Register the kernels for dispatch key CPU. Idempotent.

    Raises:
        RuntimeError: when torch_npu, which defines the operators, is not imported.
    """
    if _LIBRARY:
        return
    if not hasattr(torch.ops.npu, "npu_swiglu"):
        raise RuntimeError("simulator kernels: import torch_npu first (moe_lowering.simulator.enable() does)")
    register_kernels("npu", {name: with_limits(_overload("npu", name), kernel) for name, kernel in LOCAL.items()})
    register_kernels("npu", {name: collective(_overload("npu", name), kernel) for name, kernel in DISTRIBUTE.items()})
    clip_quant.define()
    of_library = {name: with_limits(_overload(clip_quant.NAMESPACE, name), k) for name, k in clip_quant.KERNELS.items()}
    register_kernels(clip_quant.NAMESPACE, of_library)
    register_kernels("atb", {name: with_limits(_overload("atb", name), kernel) for name, kernel in ATB.items()})


def register_kernels(namespace: str, kernels: dict[str, Kernel]) -> None:
    """Register kernels of a namespace for dispatch key CPU."""
    library = torch.library.Library(namespace, "IMPL")
    for name, kernel in kernels.items():
        library.impl(name, kernel, "CPU")
    _LIBRARY.append(library)


def _overload(namespace: str, name: str) -> torch._ops.OpOverload:
    overload: torch._ops.OpOverload = getattr(getattr(torch.ops, namespace), name).default
    return overload
