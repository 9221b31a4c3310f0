"""The operators ``torch.ops.moe_lowering.*``; importing this package registers all of them.

Each file holds one operator: its schema, its checks, its fake kernel and its CPU kernel, which defines the meaning. The
contract is in ``docs/architecture.md``.
"""

from moe_lowering.custom_ops import (
    alltoall_experts,
    assert_agreement,
    assert_tokens,
    combine,
    dispatch,
    dispatch_ffn_combine,
    dispatch_gmm_combine_decode,
    grouped_mlp,
    keep_alive,
    mega_moe,
    route,
)

__all__ = [
    "alltoall_experts",
    "assert_agreement",
    "assert_tokens",
    "combine",
    "dispatch",
    "dispatch_ffn_combine",
    "dispatch_gmm_combine_decode",
    "grouped_mlp",
    "keep_alive",
    "mega_moe",
    "route",
]
