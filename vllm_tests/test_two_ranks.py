"""Qwen3-MoE on two ranks, expert parallel within a TP group, gloo under HCCL's name: AllGather, as vllm-ascend selects on A2."""

import placements

# vllm-ascend multiplies rows that no operator wrote by zero where a rank receives fewer than two rows, and NaN would stay NaN
FINITE = {"MOE_LOWERING_SIMULATOR_UNDEFINED": "finite"}


def lines_of(rank, log):
    return [line for line in log.splitlines() if line.startswith(f"(Worker_TP{rank}_EP{rank}")]


def test_expert_parallel(served, reference):
    """vllm-ascend's own path."""
    found = served(soc="A2", ranks=2, environment=FINITE)
    assert found["tokens"] == reference.tokens


def test_expert_parallel_with_the_plugin(served, reference):
    found = served(soc="A2", ranks=2, graphs=True, plugin={})
    assert found["tokens"] == reference.tokens
    assert found["compiled"] and all("vllm.moe_forward" not in calls for calls in found["compiled"])
    for rank in range(2):
        lines = lines_of(rank, found["log"])
        assert any("graph for 1 to 256 tokens" in line for line in lines)
        assert any("implementation    allgather (vllm_ascend_main selects it)" in line for line in lines)


def test_redundant_experts(served, reference, tmp_path):
    """Experts that both ranks have, and in other places: each rank has a log2phy of its own. (vllm-ascend's own AllGather ends
    with an error here: it reads its map of logical experts by physical ids.)"""
    found = served(soc="A2", ranks=2, graphs=True, plugin={"strict": True}, additional=placements.write(tmp_path))
    assert found["tokens"] == reference.tokens
    assert [list(rank["layers"].values()) for rank in found["ranks"]] == [["", ""]] * 2


def test_allgather_where_it_is_asked_for_on_a3(served, reference):
    """vllm-ascend selects it on A3 for one rank alone."""
    found = served(soc="A3", ranks=2, graphs=True, plugin={"strict": True, "comm": "allgather"})
    assert found["tokens"] == reference.tokens
    for rank in found["ranks"]:
        assert [block["comm"] for report in rank["reports"] for block in report["blocks"]] == ["allgather"] * 2
