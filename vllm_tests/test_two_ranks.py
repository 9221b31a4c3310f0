"""Qwen3-MoE on two ranks, expert parallel within a TP group, gloo under HCCL's name: AllGather, as vllm-ascend selects on A2."""

import json

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


# Physical experts of each rank, by layer: two of them twice, and the second layer's in no order
PLACEMENTS = (
    ((0, 1, 2, 3, 4, 5, 6, 7, 8), (8, 9, 10, 11, 12, 13, 14, 15, 0)),
    ((5, 3, 15, 0, 8, 2, 7, 6, 9), (8, 10, 11, 4, 12, 1, 14, 13, 3)),
)


def expert_map(placements):
    """In the format of vllm-ascend's ``expert_map_path``."""
    layers = [
        {
            "layer_id": layer,
            "device_count": len(ranks),
            "device_list": [{"device_id": i, "device_expert": list(experts)} for i, experts in enumerate(ranks)],
        }
        for layer, ranks in enumerate(placements)
    ]
    return {"moe_layer_count": len(layers), "layer_list": layers}


def test_redundant_experts(served, reference, tmp_path):
    """Experts that both ranks have, and in other places: each rank has a log2phy of its own. (vllm-ascend's own AllGather ends
    with an error here: it reads its map of logical experts by physical ids.)"""
    path = tmp_path / "experts.json"
    path.write_text(json.dumps(expert_map(PLACEMENTS)))
    additional = {"eplb_config": {"expert_map_path": str(path)}}
    found = served(soc="A2", ranks=2, graphs=True, plugin={"strict": True}, additional=additional)
    assert found["tokens"] == reference.tokens
    assert [list(rank["layers"].values()) for rank in found["ranks"]] == [["", ""]] * 2
