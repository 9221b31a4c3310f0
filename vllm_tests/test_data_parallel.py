"""Two data parallel engines with their experts spread over both: every forward is padded to the larger one's tokens."""

import comparison
import placements
import pytest

REQUESTS = 12
CAPACITY = 8  # of MC2: vllm-ascend takes it from the largest size that is captured


@pytest.mark.parametrize(
    ("shares", "options"),
    # one that decodes, and then has no request, while the other reads prompts in parts
    [([], {}), ([11, 1], {"max_num_batched_tokens": 64})],
    ids=["unequal_prompts", "one_without_a_request"],
)
def test_same_tokens(served, reference, shares, options):
    settings = {"soc": "A2", "requests": REQUESTS, "replicas": 2, "shares": shares, "options": options}
    found = served(graphs=True, plugin={"strict": True}, **settings)
    assert found["tokens"] == reference.tokens[:REQUESTS]
    assert [list(rank["layers"].values()) for rank in found["ranks"]] == [["", ""]] * 2
    for rank in found["ranks"]:
        assert [[block["comm"] for block in report["blocks"]] for report in rank["reports"]] == [["allgather"] * 2]
    assert found["compiled"] and all("vllm.moe_forward" not in calls for calls in found["compiled"])


def test_redundant_experts(served, reference, tmp_path):
    """Experts that both engines have, and in other places."""
    settings = {"soc": "A2", "requests": REQUESTS, "replicas": 2, "additional": placements.write(tmp_path)}
    found = served(graphs=True, plugin={"strict": True}, **settings)
    assert found["tokens"] == reference.tokens[:REQUESTS]
    assert [list(rank["layers"].values()) for rank in found["ranks"]] == [["", ""]] * 2
    for rank in found["ranks"]:
        assert [[block["comm"] for block in report["blocks"]] for report in rank["reports"]] == [["allgather"] * 2]


@pytest.mark.parametrize("shares", [[], [11, 1]], ids=["unequal_prompts", "one_without_a_request"])
def test_engines_with_a_tp_group_each(served, reference, shares):
    """Two engines of two ranks, with the experts over all four."""
    settings = {"soc": "A2", "requests": REQUESTS, "ranks": 2, "replicas": 2, "shares": shares}
    found = served(graphs=True, plugin={"strict": True}, **settings)
    assert found["tokens"] == reference.tokens[:REQUESTS]
    assert [list(rank["layers"].values()) for rank in found["ranks"]] == [["", ""]] * 4
    for rank in found["ranks"]:
        assert [[block["comm"] for block in report["blocks"]] for report in rank["reports"]] == [["allgather"] * 2]


@pytest.fixture(scope="module")
def quantised(served, checkpoint):
    """A model in W8A8, and vllm-ascend's own path on one rank."""
    wide = {"hidden_size": 1024, "moe_intermediate_size": 256}  # MC2 takes hidden sizes from 1024 on
    folder = checkpoint(prompts=0, quantisation="w8a8", dtype="bfloat16", config=wide).folder
    settings = {"model": str(folder), "dtype": "bfloat16", "logprobs": comparison.BEST, "requests": REQUESTS}
    return settings, served(options={"quantization": "ascend"}, **settings)


@pytest.mark.parametrize("variation", ["alone", "tp_group", "redundant_experts"])
def test_ranges_on_a3(served, quantised, tmp_path, variation):
    """MC2 up to its capacity and AllToAll above: a rank that decodes must run the other's prefill graph, not its own."""
    settings, own = quantised
    options = {"quantization": "ascend", "compilation_config": {"compile_ranges_endpoints": [CAPACITY]}}
    ranks = 2 if variation == "tp_group" else 1
    additional = placements.write(tmp_path) if variation == "redundant_experts" else {}
    engines = {"replicas": 2, "shares": [11, 1], "ranks": ranks, "additional": additional}
    found = served(graphs=True, plugin={"strict": True}, options=options, **engines, **settings)
    assert len(found["ranks"]) == 2 * ranks
    for rank in found["ranks"]:
        names = [[block["comm"] for block in report["blocks"]] for report in rank["reports"]]
        assert names == [["mc2"] * 2, ["alltoall"] * 2]
    comparison.assert_close(own, found)
