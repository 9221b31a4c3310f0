"""Qwen3-MoE on one rank: the engine's tokens are transformers' own, eager, captured, and with the plugin."""

import pytest

OPAQUE = "vllm.moe_forward"
LOWERED = {
    "npu.npu_moe_init_routing_v2",
    "npu.npu_grouped_matmul",
    "npu.npu_moe_token_unpermute",
    "npu.npu_moe_gating_top_k",
}
SIZES = 4  # capture sizes of serve.py


def test_eager(served, reference):
    found = served()
    assert found["tokens"] == reference.tokens and found["captures"] == 0 and not found["compiled"]


def test_captured_without_the_plugin(served, reference):
    """The twin of the next test: installed and not asked for, it changes nothing."""
    found = served(graphs=True)
    assert found["tokens"] == reference.tokens and found["layers"] == {} and found["reports"] == []
    assert [OPAQUE in calls for calls in found["compiled"]] == [True] and not LOWERED & set(found["compiled"][0])
    assert found["captures"] == SIZES and found["replays"] > SIZES


def test_captured_with_the_plugin(served, reference):
    found = served(graphs=True, plugin={})
    assert found["tokens"] == reference.tokens
    assert found["layers"] == dict.fromkeys(("model.layers.0.mlp.experts", "model.layers.1.mlp.experts"), "")
    [calls] = found["compiled"]
    assert OPAQUE not in calls and set(calls) >= LOWERED
    [report] = found["reports"]
    assert [(b["name"], b["comm"]) for b in report["blocks"]] == [
        ("layers.0.mlp.experts", "allgather"),
        ("layers.1.mlp.experts", "allgather"),
    ]
    assert "graph for 1 to 256 tokens" in found["log"] and "layers.{0-1}.mlp.experts  x2" in found["log"]
    sources = {d["field"]: d["source"] for d in report["detected"]}
    assert "compile range, 1 to 256" in sources["max_tokens"] and "cudagraph_mode" in sources["capture"]
    without = served(graphs=True)
    assert (found["captures"], found["replays"]) == (without["captures"], without["replays"])
    assert len(found["captured"]) == SIZES and all(found["captured"])


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"plugin": {}}, "[vllm.eager] enforce_eager is True"),
        # On one rank MC2 is not legal: the engine works without the plugin, and so it must with it
        (
            {"plugin": {"comm": "mc2"}, "graphs": True},
            "[vllm.not_lowered] the pass's choice for 1 to 256 tokens is none",
        ),
    ],
)
def test_what_is_not_taken_over_stays(served, reference, settings, code):
    found = served(requests=3, **settings)
    assert found["tokens"] == reference.tokens[:3]
    assert len(found["layers"]) == 2 and all(why.startswith(code) for why in found["layers"].values())
    assert f"stays with vllm-ascend's operator: {code}" in found["log"]
    assert found["reports"] == [] and all(OPAQUE in calls for calls in found["compiled"])


def test_a_wrong_setting_is_one_clear_error(served):
    code, error = served(fails=True, graphs=True, plugin={"polcy": "auto"}, requests=1)
    assert code != 0
    assert (
        "additional_config['moe_lowering'] is {'polcy': 'auto'}; accepted: a dictionary with some of enable, policy"
        in error
    )
