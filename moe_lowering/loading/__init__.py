"""Loading a model from safetensors, with only those experts that a rank keeps: ``load_experts``."""

from moe_lowering.loading.files import CheckpointError
from moe_lowering.loading.load import load_experts

__all__ = ["CheckpointError", "load_experts"]
