"""cudagraph modes with pieces, as vLLM's default has: vllm-ascend compiles each piece with passes of its own, not npugraph_ex."""

import pytest
import serve

PIECES, SIZES = 3, 4  # of a model with two layers: split at attention; capture sizes of serve.py
REQUESTS = 12
ROUTED = "npu::npu_moe_init_routing_v2"
LAYERS = ["layers.0.mlp.experts", "layers.1.mlp.experts"]


def options(mode):
    return {"compilation_config": {"cudagraph_mode": mode}}


def test_pieces_without_the_plugin(served, reference):
    """The twin: captured piece by piece, attention in between."""
    found = served(graphs=True, requests=REQUESTS, options=options("PIECEWISE"))
    assert found["tokens"] == reference.tokens[:REQUESTS] and found["layers"] == {} and found["reports"] == []
    assert found["captures"] == PIECES * SIZES and not any(ROUTED in piece for piece in found["captured"])


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL_AND_PIECEWISE"])
def test_pieces_with_the_plugin(served, reference, mode):
    found = served(graphs=True, requests=REQUESTS, plugin={"strict": True}, options=options(mode))
    assert found["tokens"] == reference.tokens[:REQUESTS]
    assert list(found["layers"].values()) == ["", ""]
    # each piece is a graph of its own, and the first one has no layer
    assert [[(b["name"], b["comm"]) for b in r["blocks"]] for r in found["reports"]] == [
        [(name, "allgather")] for name in LAYERS
    ]
    whole = SIZES if mode == "FULL_AND_PIECEWISE" else 0  # decode, beside the pieces
    assert found["captures"] == PIECES * SIZES + whole
    routed = [sum(operator == ROUTED for operator in tape) for tape in found["captured"]]
    assert sorted(routed) == [0] * SIZES + [1] * (2 * SIZES) + [2] * whole


def test_a_whole_graph_without_npugraph_ex(served, reference):
    """Switched off by the user: one graph, by the same way as pieces."""
    off = {"ascend_compilation_config": {**serve.FUSIONS, "enable_npugraph_ex": False}}
    found = served(graphs=True, requests=REQUESTS, plugin={"strict": True}, additional=off)
    assert found["tokens"] == reference.tokens[:REQUESTS] and found["compiled"] == []
    assert [[block["comm"] for block in report["blocks"]] for report in found["reports"]] == [["allgather"] * 2]
    assert found["captures"] == SIZES and all(tape.count(ROUTED) == 2 for tape in found["captured"])
