"""moe_lowering: compile mixture-of-experts models for Ascend NPUs.

MoE layers become four generic operators (``route``, ``dispatch``, ``grouped_mlp``, ``combine``); a torch.compile/FX pass
rewrites them into the Ascend communication implementation that is legal for the deployment. See README.md.

Names are loaded when they are first used, so that ``import moe_lowering`` (and ``moe-lowering --help``) need not load torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from moe_lowering import _bootstrap

_bootstrap.disable_autoload_without_cann()

if TYPE_CHECKING:
    from moe_lowering import serving as serving
    from moe_lowering import simulator as simulator
    from moe_lowering import testing as testing
    from moe_lowering.agreement import AgreementError, check_agreement
    from moe_lowering.backends.aot import lowering_backend
    from moe_lowering.backends.npugraph_ex import npugraph_ex_options
    from moe_lowering.backends.torchair import torchair_config
    from moe_lowering.deployment import Deployment
    from moe_lowering.experts import list_experts, log2phy_from_expert_maps
    from moe_lowering.explanation import BlockDescription, explain
    from moe_lowering.functional import moe_experts, route
    from moe_lowering.interrupts import interruptible
    from moe_lowering.layers import MoE, shard_experts
    from moe_lowering.loading import CheckpointError, load_experts
    from moe_lowering.passes.pipeline import LoweringError, MoeLowering
    from moe_lowering.quantisation import quantise_experts
    from moe_lowering.smooth_scales import drop_unit_smooth_scales

_HOME = {
    "AgreementError": "agreement",
    "BlockDescription": "explanation",
    "CheckpointError": "loading",
    "Deployment": "deployment",
    "LoweringError": "passes.pipeline",
    "MoE": "layers",
    "MoeLowering": "passes.pipeline",
    "check_agreement": "agreement",
    "drop_unit_smooth_scales": "smooth_scales",
    "explain": "explanation",
    "interruptible": "interrupts",
    "list_experts": "experts",
    "load_experts": "loading",
    "log2phy_from_expert_maps": "experts",
    "lowering_backend": "backends.aot",
    "moe_experts": "functional",
    "npugraph_ex_options": "backends.npugraph_ex",
    "quantise_experts": "quantisation",
    "route": "functional",
    "shard_experts": "layers",
    "torchair_config": "backends.torchair",
}
# Loaded when they are named, as ``moe_lowering.simulator``; not by ``import *``, as testing and serving need more than torch.
_MODULES = ("serving", "simulator", "testing")

__all__ = [
    "AgreementError",
    "BlockDescription",
    "CheckpointError",
    "Deployment",
    "LoweringError",
    "MoE",
    "MoeLowering",
    "check_agreement",
    "drop_unit_smooth_scales",
    "explain",
    "interruptible",
    "list_experts",
    "load_experts",
    "log2phy_from_expert_maps",
    "lowering_backend",
    "moe_experts",
    "npugraph_ex_options",
    "quantise_experts",
    "route",
    "shard_experts",
    "torchair_config",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"moe_lowering.{name}")
    if name not in _HOME:
        raise AttributeError(
            f"module 'moe_lowering' has no attribute {name!r}; it has {', '.join((*__all__, *_MODULES))}"
        )
    return getattr(importlib.import_module(f"moe_lowering.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
