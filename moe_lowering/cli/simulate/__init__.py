"""``moe-lowering simulate``."""
