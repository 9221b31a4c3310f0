"""A model's MoE layers. Inference only.

``moe`` is the layer that this package writes, ``expert_modules`` finds the MoE modules of any model, this package's and those of
transformers, and ``sharding`` gives a rank its part of their experts.
"""

from moe_lowering.layers.moe import MoE
from moe_lowering.layers.sharding import shard_experts

__all__ = ["MoE", "shard_experts"]
