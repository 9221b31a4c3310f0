"""moe_lowering: compile mixture-of-experts models for Ascend NPUs.

MoE layers become four generic operators (``route``, ``dispatch``, ``grouped_mlp``, ``combine``); a torch.compile/FX pass
rewrites them into the Ascend communication implementation that is legal for the deployment. See README.md.
"""

from moe_lowering import _bootstrap

_bootstrap.disable_autoload_without_cann()

from moe_lowering.agreement import AgreementError, check_agreement  # noqa: E402
from moe_lowering.backends.aot import lowering_backend  # noqa: E402
from moe_lowering.backends.npugraph_ex import npugraph_ex_options  # noqa: E402
from moe_lowering.deployment import Deployment  # noqa: E402
from moe_lowering.functional import moe_experts, route  # noqa: E402
from moe_lowering.layers import MoE, shard_experts  # noqa: E402
from moe_lowering.passes.pipeline import LoweringError, MoeLowering  # noqa: E402

__all__ = [
    "AgreementError",
    "Deployment",
    "LoweringError",
    "MoE",
    "MoeLowering",
    "check_agreement",
    "lowering_backend",
    "moe_experts",
    "npugraph_ex_options",
    "route",
    "shard_experts",
]
