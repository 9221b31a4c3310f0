"""``moe-lowering models``: what becomes of every family of MoE models of the installed transformers, as one table."""
