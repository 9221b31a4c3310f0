"""``moe-lowering matrix``: every implementation on real ranks, with every weight format, as one table."""
