"""Loading a model from safetensors, of its experts only those that a rank keeps (``load.load_experts``)."""

from moe_lowering.loading.files import CheckpointError
from moe_lowering.loading.load import load_experts

__all__ = ["CheckpointError", "load_experts"]
