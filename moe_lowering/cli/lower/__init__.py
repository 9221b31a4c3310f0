"""``moe-lowering lower``: lower a model's MoE layers, run it, and compare with the model's own output."""
