"""DeepSeek-V3 small (MLA, shared experts, groups of experts with a correction bias) with the plugin and without.

vllm-ascend computes MLA's prefill in bfloat16 whatever the model's dtype, so tokens of transformers in float32 are not the bar:
log probabilities are, and the two engines' tokens against each other.
"""

import comparison
import pytest

SERVED = {"logprobs": comparison.BEST}
FLOOR = 40.0  # dB against transformers


@pytest.fixture(scope="module")
def own(served, checkpoint):
    """vllm-ascend's own path, eager."""
    return served(model=str(checkpoint("deepseek_v3").folder), **SERVED)


def test_the_engine_computes_the_model(own, checkpoint):
    reference = checkpoint("deepseek_v3")
    assert comparison.ratio(reference.logprobs, own["logprobs"]) > FLOOR
    comparison.assert_close(reference._asdict(), own)
    first = [tokens[0] for tokens in own["tokens"]]
    assert sum(a == b[0] for a, b in zip(first, reference.tokens, strict=True)) >= len(first) - 1


def test_with_the_plugin(own, served, checkpoint):
    folder = checkpoint("deepseek_v3").folder
    found = served(model=str(folder), graphs=True, plugin={"strict": True}, **SERVED)
    assert found["tokens"] == own["tokens"]
    assert found["layers"] == {f"model.layers.{i}.mlp.experts": "" for i in (1, 2)}  # the first layer is dense
    [calls] = found["compiled"]
    assert not any(name.startswith("vllm.moe_forward") for name in calls) and "npu.npu_grouped_matmul" in calls
    assert found["captures"] == 4 and found["replays"] > 4
    [report] = found["reports"]
    assert [block["comm"] for block in report["blocks"]] == ["allgather"] * 2


def test_quantised_with_the_plugin(served, checkpoint):
    """Routed experts in W8A8, shared ones not."""
    folder = checkpoint("deepseek_v3", prompts=0, quantisation="w8a8", dtype="bfloat16").folder
    settings = {"model": str(folder), "dtype": "bfloat16", "options": {"quantization": "ascend"}, **SERVED}
    own = served(**settings)
    found = served(graphs=True, plugin={"strict": True}, **settings)
    assert list(found["layers"].values()) == ["", ""] and own["layers"] == {}
    [calls] = found["compiled"]
    assert {"npu.npu_dynamic_quant", "npu.npu_grouped_matmul"} <= set(calls)
    assert not any(name.startswith("vllm.moe_forward") for name in calls)
    comparison.assert_close(own, found)


def test_two_ranks_with_the_plugin(own, served, checkpoint):
    """Expert parallel. The result of the routed experts is complete on each rank, and that of the shared ones is reduced once."""
    folder = checkpoint("deepseek_v3").folder
    found = served(model=str(folder), soc="A2", ranks=2, graphs=True, plugin={"strict": True}, **SERVED)
    assert found["tokens"] == own["tokens"]
    assert comparison.ratio(own["logprobs"], found["logprobs"]) > FLOOR
    assert len(found["compiled"]) == 2
    assert not any(name.startswith("vllm.moe_forward") for calls in found["compiled"] for name in calls)
    for rank in range(2):
        lines = [line for line in found["log"].splitlines() if line.startswith(f"(Worker_TP{rank}_EP{rank}")]
        assert any("implementation    allgather (vllm_ascend_main selects it)" in line for line in lines)


def test_a_model_that_the_plugin_does_not_know_is_served_without_it(served, checkpoint):
    """The twin of ``test_with_the_plugin``: sigmoid scores that are not normalised, which vllm-ascend's operator computes."""
    other = checkpoint("deepseek_v3", prompts=8, config={"norm_topk_prob": False})
    found = served(model=str(other.folder), requests=8, graphs=True, plugin={}, **SERVED)
    why = "[vllm.scoring] the scoring is sigmoid, renormalize False; accepted: softmax, or sigmoid with renormalize"
    assert list(found["layers"].values()) == [why, why] and found["reports"] == []
    assert found["compiled"] and all(
        any(c.startswith("vllm.moe_forward") for c in calls) for calls in found["compiled"]
    )
