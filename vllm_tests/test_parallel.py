"""Ways to use two ranks that the plugin does not take over: the tokens are right, and the reason is in the log."""

import pytest

REQUESTS = 12


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"ranks": 2, "expert_parallel": False}, "[vllm.tensor_parallel] the tensor parallel size of the experts is 2"),
        # vLLM then cuts each expert over the data parallel ranks
        (
            {"replicas": 2, "expert_parallel": False},
            "[vllm.tensor_parallel] the tensor parallel size of the experts is 2",
        ),
    ],
)
def test_stays_with_vllm_ascend(served, reference, settings, code):
    found = served(soc="A2", requests=REQUESTS, graphs=True, plugin={}, **settings)
    assert found["tokens"] == reference.tokens[:REQUESTS]
    assert len(found["ranks"]) == 2
    for rank in found["ranks"]:
        assert len(rank["layers"]) == 2 and all(why.startswith(code) for why in rank["layers"].values())
        assert rank["reports"] == []
    assert found["log"].count(f"stays with vllm-ascend's operator: {code}") == 4  # two layers on each rank
    assert found["compiled"] and all("vllm.moe_forward" in calls for calls in found["compiled"])
