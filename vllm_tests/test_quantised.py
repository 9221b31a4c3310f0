"""Qwen3-MoE with quantised experts on one rank: the plugin against vllm-ascend's own path."""

import comparison
import pytest

SERVED = {"dtype": "bfloat16", "requests": 8, "logprobs": 5, "options": {"quantization": "ascend"}}
# int4 weights have lines in multiples of 256
MODEL = {"dtype": "bfloat16", "config": {"moe_intermediate_size": 256}}


@pytest.mark.parametrize("quantisation", ["w8a8", "w4a8"])
def test_quantised_experts(served, checkpoint, quantisation):
    folder = checkpoint(prompts=0, quantisation=quantisation, **MODEL).folder
    own = served(model=str(folder), graphs=quantisation == "w8a8", **SERVED)
    found = served(model=str(folder), graphs=True, plugin={"strict": True}, **SERVED)
    assert list(found["layers"].values()) == ["", ""] and own["layers"] == {}
    [calls] = found["compiled"]
    assert {"npu.npu_dynamic_quant", "npu.npu_grouped_matmul"} <= set(calls) and "vllm.moe_forward" not in calls
    [report] = found["reports"]
    assert [b["comm"] for b in report["blocks"]] == ["allgather"] * 2
    comparison.assert_close(own, found)
    if quantisation == "w8a8":  # the same operators, but for the dtype of the routing weights
        assert found["tokens"] == own["tokens"]
        comparison.assert_documented("W8A8, one rank", own, found)
