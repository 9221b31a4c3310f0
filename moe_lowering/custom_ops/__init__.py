"""The operators ``torch.ops.moe_lowering.*``; importing this package registers all of them.

Each file holds one operator: its schema, its checks, its fake kernel and its CPU kernel, which defines the meaning. The
contract is in ``docs/architecture.md``.
"""

from moe_lowering.custom_ops import assert_tokens, combine, dispatch, dispatch_ffn_combine, grouped_mlp, route

__all__ = ["assert_tokens", "combine", "dispatch", "dispatch_ffn_combine", "grouped_mlp", "route"]
