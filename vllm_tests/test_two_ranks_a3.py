"""Qwen3-MoE in W8A8 on two ranks of A3: MC2, AllToAll and FusedMC2, each where vllm-ascend selects it, against its own path."""

import comparison
import placements
import pytest

SERVED = {"dtype": "bfloat16", "logprobs": 5}
OPTIONS = {"quantization": "ascend"}
# MC2 takes hidden sizes from 1024 on
MODEL = {"quantisation": "w8a8", "dtype": "bfloat16", "config": {"hidden_size": 1024, "moe_intermediate_size": 256}}
GRAPH = "moe_lowering: graph for "  # in the log
CAPACITY = 8  # of MC2: vllm-ascend takes it from the largest size that is captured
# vllm-ascend multiplies rows that no operator wrote by zero, and NaN would stay NaN
FINITE = {"MOE_LOWERING_SIMULATOR_UNDEFINED": "finite"}
# dB to its own path on two ranks: with the same operators, 38 were measured; the fused one rounds elsewhere
LEAST = {"mc2": 33.0, "fused_mc2": comparison.FLOOR}
CALLS = {
    "mc2": {"npu.npu_moe_distribute_dispatch_v2", "npu.npu_moe_distribute_combine_v2"},
    "alltoall": {"_c10d_functional.all_to_all_single", "npu.npu_moe_init_routing_v2"},
    "fused_mc2": {"moe_lowering.dispatch_ffn_combine"},
}


@pytest.fixture(scope="module")
def one_rank(served, checkpoint):
    """vllm-ascend's own path on one rank."""
    folder = checkpoint(prompts=0, **MODEL).folder
    return served(model=str(folder), options=OPTIONS, **SERVED)


@pytest.fixture(scope="module")
def own(served, checkpoint):
    """The same on two ranks: AllToAll in prefill and MC2 in captured decode, behind the opaque operator."""
    folder = checkpoint(prompts=0, **MODEL).folder
    return served(model=str(folder), ranks=2, graphs=True, options=OPTIONS, environment=FINITE, **SERVED)


def test_vllm_ascends_own_path(own, one_rank):
    assert all("vllm.moe_forward" in calls for calls in own["compiled"]) and own["compiled"]
    comparison.assert_close(one_rank, own)


def chosen(log, rank):
    """(range, implementation) of each graph of a rank, in order."""
    own = [line for line in log.splitlines() if line.startswith(f"(Worker_TP{rank}_EP{rank}")]
    ranges = [line.split(GRAPH)[1] for line in own if GRAPH in line]
    names = [line.split("implementation ")[1].split()[0].strip(",") for line in own if " implementation  " in line]
    return list(zip(ranges, names, strict=True))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"options": {"compilation_config": {"compile_ranges_endpoints": [CAPACITY]}}},
            [("1 to 8 tokens", "mc2"), ("9 to 256 tokens", "alltoall")],
        ),
        ({"additional": {"enable_fused_mc2": 1}}, [("1 to 256 tokens", "fused_mc2")]),
    ],
)
def test_what_vllm_ascend_selects(served, checkpoint, own, settings, expected):
    folder = checkpoint(prompts=0, **MODEL).folder
    settings = {**settings, "options": {**OPTIONS, **settings.get("options", {})}}
    found = served(model=str(folder), ranks=2, graphs=True, plugin={"strict": True}, **settings, **SERVED)
    for rank in range(2):
        assert chosen(found["log"], rank) == expected
    for _, comm in expected:
        graphs = [calls for calls in found["compiled"] if set(calls) >= CALLS[comm]]
        assert len(graphs) == 2, comm  # one of each rank
    assert all("vllm.moe_forward" not in calls for calls in found["compiled"])
    comparison.assert_close(own, found)
    assert comparison.ratio(own["logprobs"], found["logprobs"]) > LEAST[expected[0][1]]
    decode = expected[0][1]
    comparison.assert_documented(f"W8A8, two ranks, {decode}", own, found)


@pytest.mark.parametrize("what", ["pieces", "redundant_experts"])
def test_variations(served, checkpoint, own, tmp_path, what):
    """Each piece as a graph of its own, as by vLLM's default; experts that both ranks have, in other places."""
    folder = checkpoint(prompts=0, **MODEL).folder
    compilation = {"compile_ranges_endpoints": [CAPACITY]}
    if what == "pieces":
        compilation["cudagraph_mode"] = "FULL_AND_PIECEWISE"
    settings = {"options": {**OPTIONS, "compilation_config": compilation}, **SERVED}
    if what == "redundant_experts":
        settings["additional"] = placements.write(tmp_path)
    found = served(model=str(folder), ranks=2, graphs=True, plugin={"strict": True}, **settings)
    for rank in found["ranks"]:
        assert list(rank["layers"].values()) == ["", ""]
        names = sorted(block["comm"] for report in rank["reports"] for block in report["blocks"])
        assert names == ["alltoall"] * 2 + ["mc2"] * 2
        # the ranks compare each kind of graph once: layers are alike, so pieces of a range share a round
        assert sum(rounds.get("blocks", 0) for rounds in rank["rounds"]) == 2
    comparison.assert_close(own, found)
    assert comparison.ratio(own["logprobs"], found["logprobs"]) > LEAST["mc2"]
