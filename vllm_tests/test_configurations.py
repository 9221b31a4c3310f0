"""vLLM's configurations, one by one: each serves the tokens that it serves without the plugin, or the log says what stays."""

import comparison
import pytest
import serve

REQUESTS = 12
OPAQUE = "vllm.moe_forward"
SHORT = 32  # max_num_batched_tokens, below the longest prompt and far below all of them
# option: what it changes, capture sizes that remain
TAKEN_OVER = {
    "chunked_prefill": ({"max_num_batched_tokens": SHORT}, 4),
    "more_sequences_than_captured": ({"max_num_seqs": 32}, 4),
    "other_sizes": ({"compilation_config": {"cudagraph_capture_sizes": [1, 3, 5]}}, 3),
}


@pytest.mark.parametrize("name", TAKEN_OVER)
def test_taken_over_with_the_same_tokens(served, reference, name):
    options, sizes = TAKEN_OVER[name]
    found = served(requests=REQUESTS, graphs=True, plugin={"strict": True}, options=options)
    assert found["tokens"] == reference.tokens[:REQUESTS]
    assert list(found["layers"].values()) == ["", ""] and found["captures"] == sizes
    assert found["compiled"] and all(OPAQUE not in calls for calls in found["compiled"])
    [report] = found["reports"]
    assert [block["comm"] for block in report["blocks"]] == ["allgather"] * 2
    most = options.get("max_num_batched_tokens", 256)
    assert f"graph for 1 to {most} tokens" in found["log"]


def test_chunked_prefill_without_the_plugin(served, reference):
    """The twin: prompts are in parts here too. The longest does not fit one batch."""
    asked = serve.Settings(model="", cache="", requests=REQUESTS)
    assert max(len(prompt) for prompt in serve.prompts(asked)) > SHORT
    options, _ = TAKEN_OVER["chunked_prefill"]
    found = served(requests=REQUESTS, options=options)
    assert found["tokens"] == reference.tokens[:REQUESTS] and not found["compiled"]


def test_a_pre_pass_of_the_user_runs_too(served, reference):
    """Put into npugraph_ex's configuration by somebody else's code, before the plugin reads it."""
    fault = {"VLLM_TESTS_FAULT": "own_pass"}
    options = {"worker_extension_cls": "faults.Extension"}
    found = served(requests=3, graphs=True, plugin={"strict": True}, options=options, environment=fault)
    assert found["tokens"] == reference.tokens[:3]
    assert "the user's own pass saw 2 moe_lowering.dispatch" in found["log"]  # it runs first
    assert len(found["reports"]) == 1 and all(OPAQUE not in calls for calls in found["compiled"])


def test_a_pre_pass_instead_of_ours_is_told(served):
    """The twin: the plugin's pass is gone from the options, so that nothing lowers what was taken over."""
    fault = {"VLLM_TESTS_FAULT": "own_pass_instead"}
    options = {"worker_extension_cls": "faults.Extension"}
    code, error = served(
        fails=True, requests=3, graphs=True, plugin={"strict": True}, options=options, environment=fault
    )
    assert code != 0 and "moe_lowering (strict): [vllm.pass_not_run] post_grad_custom_pre_pass is " in error


def test_float16(served, checkpoint):
    """vllm-ascend rounds routing weights to the model's dtype and the plugin does not, so numbers are close and not equal."""
    folder = checkpoint(prompts=0, dtype="float16").folder
    settings = {"model": str(folder), "dtype": "float16", "requests": REQUESTS, "logprobs": comparison.BEST}
    own = served(**settings)
    found = served(graphs=True, plugin={"strict": True}, **settings)
    assert list(found["layers"].values()) == ["", ""]
    comparison.assert_close(own, found)


def test_a_trace_is_used_again_where_the_plugin_decides_alike(served, reference, tmp_path):
    """vLLM's compile cache has the traced model, whose key must have what the plugin read of the machine."""
    settings = {"graphs": True, "plugin": {"strict": True}, "requests": 3, "cache": str(tmp_path)}
    runs = [("A3", {}), ("A3", {"AGAIN": "1"}), ("A2", {})]
    found = [served(soc=soc, environment=environment, **settings) for soc, environment in runs]
    assert [each["tokens"] for each in found] == [reference.tokens[:3]] * 3
    assert ["Directly load AOT compilation" in each["log"] for each in found] == [False, True, False]
