"""CPU kernels on a rank that holds no token."""

import torch


def test_gating_of_nothing_in_groups():
    weights, ids, _ = torch.ops.npu.npu_moe_gating_top_k(torch.ones(0, 8), 2, k_group=1, group_count=2)
    assert weights.shape == ids.shape == (0, 2)


def test_clipped_swiglu_of_nothing():
    assert torch.ops.npu.npu_clipped_swiglu(torch.ones(0, 8)).shape == (0, 4)
