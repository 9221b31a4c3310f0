"""The operators ``torch.ops.moe_lowering.*``; importing this package registers all of them.

An operator's file holds the record of its arguments (from which ``library`` makes the schema), its checks, its fake kernel
and its CPU kernel, which defines the meaning; a fused operator's file also the kernel that calls its provider. The other
files hold what several of them share: sizes (``sizes``), places of experts (``placement``), exchanges (``exchange``,
``dispatch_plan``, ``token_exchange``), arithmetic (``quantised``) and rules of the fused operators (``fused``). The contract
is in ``docs/architecture.md``.
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
