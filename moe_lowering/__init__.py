from moe_lowering import _bootstrap

_bootstrap.disable_autoload_without_cann()

from moe_lowering.deployment import Deployment  # noqa: E402

__all__ = ["Deployment"]
