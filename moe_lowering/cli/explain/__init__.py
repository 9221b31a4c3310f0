"""``moe-lowering explain``: which implementations are legal for a model's MoE blocks, and why."""
