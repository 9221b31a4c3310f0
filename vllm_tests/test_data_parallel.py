"""Two data parallel engines with their experts spread over both: every forward is padded to the larger one's tokens."""

import pytest

REQUESTS = 12


@pytest.mark.parametrize("shares", [[], [11, 1]], ids=["unequal_prompts", "one_without_a_request"])
def test_same_tokens(served, reference, shares):
    found = served(soc="A2", requests=REQUESTS, replicas=2, shares=shares, graphs=True, plugin={"strict": True})
    assert found["tokens"] == reference.tokens[:REQUESTS]
    assert [list(rank["layers"].values()) for rank in found["ranks"]] == [["", ""]] * 2
    for rank in found["ranks"]:
        assert [[block["comm"] for block in report["blocks"]] for report in rank["reports"]] == [["allgather"] * 2]
    assert found["compiled"] and all("vllm.moe_forward" not in calls for calls in found["compiled"])
