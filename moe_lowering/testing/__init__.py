"""What a test suite imports to test MoE lowering without an NPU, without ranks and without weights.

    from moe_lowering import testing

    def test_decode_is_fused():
        with testing.fake_deployment(ep_size=16, max_tokens=128) as deployment, testing.fake_tensors():
            model = moe_lowering.MoE(1024, 512, num_experts=64, top_k=4, deployment=deployment, dtype=torch.bfloat16)
            x = torch.empty(32, 1024, dtype=torch.bfloat16)
            lowered = testing.lower_graph(model, x, deployment=deployment)
        testing.assert_lowered(lowered, comm="fused_mc2", ops=["moe_lowering.dispatch_ffn_combine"])

``Ranks`` runs functions on real gloo ranks.
"""

from moe_lowering.testing.graphs import (
    Lowered,
    assert_lowered,
    assert_refused,
    fake_deployment,
    fake_tensors,
    lower_graph,
)
from moe_lowering.testing.ranks import RankError, Ranks

__all__ = [
    "Lowered",
    "RankError",
    "Ranks",
    "assert_lowered",
    "assert_refused",
    "fake_deployment",
    "fake_tensors",
    "lower_graph",
]
