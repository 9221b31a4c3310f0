"""A test suite of your own with fake deployments of 64 ranks, in one process: pytest examples/test_decode.py"""

import moe_lowering  # before torch, where torch_npu is installed without CANN

import pytest
import torch

from moe_lowering import testing

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 4096, 1536, 128, 8


def lower(tokens: int, dtype: torch.dtype = torch.bfloat16, comm: str = "auto", **fields: object) -> testing.Lowered:
    """The graph of rank 0 of 64, without weights."""
    with testing.fake_deployment(ep_size=64, max_tokens=tokens, **fields) as deployment, testing.fake_tensors():
        layer = moe_lowering.MoE(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, deployment=deployment, dtype=dtype)
        return testing.lower_graph(layer, torch.empty(tokens, HIDDEN, dtype=dtype), deployment=deployment, comm=comm)


@pytest.mark.parametrize("tokens", [1, 64, 256])
def test_decode_is_mc2_where_it_is_asked_for(tokens: int) -> None:
    operators = ["npu.npu_moe_distribute_dispatch_v2", "npu.npu_moe_distribute_combine_v2"]
    testing.assert_lowered(lower(tokens, comm="mc2"), comm="mc2", ops=operators)


def test_prefill_is_too_long_for_it() -> None:
    testing.assert_refused(lower(4096, comm="mc2"), comm="mc2", code="mc2.tokens")


def test_float32_is_refused() -> None:
    testing.assert_refused(lower(64, torch.float32, comm="mc2"), comm="mc2", code="mc2.x_dtype")


def test_a_small_window_is_refused() -> None:
    testing.assert_refused(lower(256, comm="mc2", hccl_buffer_mb=50), comm="mc2", code="mc2.buffer")
