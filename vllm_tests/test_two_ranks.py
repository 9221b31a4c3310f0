"""Qwen3-MoE on two ranks, expert parallel within a TP group, gloo under HCCL's name: AllGather, as vllm-ascend selects on A2."""

REQUESTS = 6


def test_expert_parallel(served, reference):
    """vllm-ascend's own path."""
    found = served(soc="A2", ranks=2, requests=REQUESTS)
    assert found["tokens"] == reference[1][:REQUESTS]


def test_expert_parallel_with_the_plugin(served, reference):
    found = served(soc="A2", ranks=2, requests=REQUESTS, graphs=True, plugin={})
    assert found["tokens"] == reference[1][:REQUESTS]
    assert found["compiled"] and all("vllm.moe_forward" not in calls for calls in found["compiled"])
    for rank in range(2):
        lines = [line for line in found["log"].splitlines() if line.startswith(f"(Worker_TP{rank}_EP{rank}")]
        assert any("graph for 1 to 256 tokens" in line for line in lines)
        assert any("implementation    allgather (vllm_ascend_main selects it)" in line for line in lines)
