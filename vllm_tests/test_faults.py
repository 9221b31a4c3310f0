"""What goes wrong on two ranks: one clear message, an exit code, and no process that waits past its time."""

import time

import pytest

REQUESTS = 3
SECONDS = 600  # of an engine that fails, on a busy machine
EITHER = {"requests": REQUESTS, "soc": "A2", "fails": True, "timeout": SECONDS}
TWO, ENGINES = {**EITHER, "ranks": 2}, {**EITHER, "replicas": 2}  # of one engine; data parallel
EXTENSION = {"worker_extension_cls": "faults.Extension"}
LEFT = "rank 1: model.layers.0.mlp.experts: it stays with vllm-ascend's operator, [vllm.fault]"


@pytest.mark.parametrize(
    ("fault", "ranks", "message"),
    [
        ("deployment", TWO, "hccl_buffer_mb"),
        ("kill", TWO, "EngineDeadError"),
        ("kill", ENGINES, "EngineDeadError"),
        ("left", ENGINES, LEFT),
    ],
    ids=["deployment", "kill", "kill_an_engine", "left"],
)
def test_one_rank_is_at_fault(served, fault, ranks, message):
    began = time.monotonic()
    code, error = served(graphs=True, plugin={}, options=EXTENSION, environment={"VLLM_TESTS_FAULT": fault}, **ranks)
    assert code != 0 and message in error, error[-3000:]
    assert time.monotonic() - began < SECONDS
    if ranks is ENGINES:
        assert "replicas with an error: 0, 1" in error, error
    if fault == "left":  # both engines say it, the one that took no layer over too
        said = {line.split()[0] for line in error.splitlines() if message in line}
        assert {"(Worker_DP0_EP0", "(Worker_DP1_EP1"} <= said, error


@pytest.mark.parametrize("ranks", [TWO, ENGINES], ids=["two", "engines"])
def test_without_a_fault_the_same_engine_serves(served, reference, ranks):
    found = served(graphs=True, plugin={}, options=EXTENSION, **{**ranks, "fails": False})
    assert found["tokens"] == reference.tokens[:REQUESTS]


def test_a_batch_above_the_capacity_of_mc2(served, checkpoint):
    """MC2 alone is asked for, and the largest batch is beyond what it takes; strict: the engine does not start."""
    folder = checkpoint(prompts=0, dtype="bfloat16", config={"hidden_size": 1024, "moe_intermediate_size": 256}).folder
    settings = {"graphs": True, "plugin": {"comm": "mc2", "strict": True}, "options": {"max_num_batched_tokens": 4096}}
    code, error = served(model=str(folder), dtype="bfloat16", **settings, **{**TWO, "soc": "A3"})
    assert code != 0
    assert (
        "moe_lowering (strict): model.layers.0.mlp.experts: [vllm.not_lowered] the pass's choice for 1 to 4096 tokens"
        in error
    )


def test_lora_stays_with_vllm_ascend(served, checkpoint):
    """Decided when the weights are loaded. (The engine then ends: sgmv_shrink and sgmv_expand have no kernel here.)"""
    folder = checkpoint(prompts=0, dtype="bfloat16").folder
    options = {"enable_lora": True, "max_lora_rank": 8}
    settings = {"graphs": True, "plugin": {}, "requests": 2, "options": options}
    code, error = served(model=str(folder), dtype="bfloat16", fails=True, timeout=SECONDS, **settings)
    assert code != 0 and "aclGetDeviceCapability" in error
    why = "stays with vllm-ascend's operator: [vllm.lora] lora_config is given; accepted: none"
    assert [line.count(why) for line in error.splitlines() if ".mlp.experts stays" in line] == [1, 1]


def test_dynamic_load_balancing_is_refused(served):
    """Its experts move while the engine serves, and a graph is compiled for their places; strict: the engine does not start."""
    balancing = {"eplb_config": {"dynamic_eplb": True, "num_redundant_experts": 2}}
    settings = {"graphs": True, "plugin": {"strict": True}, "additional": balancing}
    code, error = served(environment={"DYNAMIC_EPLB": "true"}, **settings, **TWO)
    assert code != 0
    why = "[vllm.dynamic_eplb] dynamic expert load balancing is True; accepted: none"
    assert f"moe_lowering (strict): model.layers.0.mlp.experts: {why}" in error
