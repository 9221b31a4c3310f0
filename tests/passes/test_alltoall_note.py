"""The note on what equal splits cost: its figures against the bytes of the collectives in lowered graphs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lowering import moe_experts, testing

EP, EXPERTS, TOP_K, HIDDEN, INNER, TOKENS = 4, 16, 4, 2048, 512, 1024
MB = 10**6
c10d = torch.ops._c10d_functional


def weights(quantisation: str, dtype: torch.dtype) -> dict[str, Tensor]:
    packed, kind = {"none": (1, dtype), "w8a8": (1, torch.int8), "w4a8": (8, torch.int32), "w4a16": (8, torch.int32)}[
        quantisation
    ]
    found: dict[str, Tensor] = {}
    for name, rows, columns in (("w13", HIDDEN, 2 * INNER), ("w2", INNER, HIDDEN)):
        local = EXPERTS // EP
        found[name] = torch.empty(local, rows, columns // packed, dtype=kind)
        if quantisation != "none":
            found[f"{name}_scale"] = torch.empty(
                local, columns, dtype=dtype if quantisation == "w4a16" else torch.float32
            )
        if quantisation == "w4a8":
            found[f"{name}_scale_bias"] = torch.empty(local, columns)
    return found


def lowered(quantisation: str, comm: str, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Any:
    with testing.fake_deployment(ep_size=EP, **fields) as where:
        with testing.fake_tensors():
            given = weights(quantisation, dtype)
            x = torch.empty(TOKENS, HIDDEN, dtype=dtype)
            routing, ids = torch.empty(TOKENS, TOP_K), torch.empty(TOKENS, TOP_K, dtype=torch.int32)

        def run(x: Tensor, routing: Tensor, ids: Tensor) -> Tensor:
            return moe_experts(x, routing, ids, quantisation=quantisation, deployment=where, **given)

        return testing.lower_graph(run, x, routing, ids, deployment=where, comm=comm)


def sizes(graph: Any, op: Any, of_input: bool) -> list[int]:
    nodes = graph.gm.graph.find_nodes(op="call_function", target=op)
    values = [(node.args[0] if of_input else node).meta["val"] for node in nodes]
    return [value.numel() * value.element_size() for value in values]


def figures(graph: Any) -> tuple[list[float], str]:
    (note,) = (text for text in graph.report.blocks[0].notes if text.startswith("equal splits"))
    return [float(text) for text in re.findall(r"([\d.]+) MB", note)], note


UNEQUAL = {"equal_tokens": False, "max_tokens": TOKENS}
CASES = [
    ("none", torch.bfloat16, {}), ("none", torch.float32, {}), ("w8a8", torch.bfloat16, {}), ("w8a8", torch.float16, {}),
    ("w4a8", torch.bfloat16, {}), ("w4a16", torch.bfloat16, {}), ("w8a8", torch.bfloat16, {"max_rows": 4096}),
    ("w8a8", torch.bfloat16, {"tp_size": 2}), ("none", torch.bfloat16, UNEQUAL), ("w8a8", torch.bfloat16, UNEQUAL),
]  # fmt: skip


@pytest.mark.parametrize(("quantisation", "dtype", "fields"), CASES, ids=str)
def test_figures_are_those_of_the_graphs(quantisation: str, dtype: torch.dtype, fields: dict[str, Any]) -> None:
    graph = lowered(quantisation, "alltoall", dtype, **fields)
    testing.assert_lowered(graph, comm="alltoall")
    assert graph.report.blocks[0].verdicts["alltoall"].form == "static"
    (back,) = sizes(graph, c10d.all_to_all_single.default, True)
    there = received(graph, dtype, fields)
    ignored = [text for text in graph.report.blocks[0].notes if "alltoall (static) has room for every row" in text]
    assert len(ignored) == ("max_rows" in fields)
    found, note = figures(graph)
    assert found == pytest.approx([size / MB for size in (there, back, there / EP, back / EP)], abs=0.051), note


def received(graph: Any, dtype: torch.dtype, fields: dict[str, Any]) -> int:
    """Bytes of all tensors that are gathered in the EP group; in the TP group those of results are."""
    tp_gather = TOKENS * HIDDEN * dtype.itemsize if "tp_size" in fields else 0
    return sum(sizes(graph, c10d.all_gather_into_tensor.default, False)) - tp_gather


@pytest.mark.parametrize("quantisation", ["none", "w8a8", "w4a8", "w4a16"])
@pytest.mark.parametrize("max_rows", [4095, 600], ids=str)
def test_figures_of_buffers_are_those_of_the_graphs(quantisation: str, max_rows: int) -> None:
    """One row fewer than a rank may have for another (1,024 tokens, each to 4 experts) makes buffers the shorter form."""
    dtype, fields = torch.bfloat16, {"max_rows": max_rows}
    graph = lowered(quantisation, "alltoall", dtype, **fields)
    testing.assert_lowered(graph, comm="alltoall")
    verdict = graph.report.blocks[0].verdicts["alltoall"]
    assert verdict.form == "buffers"
    assert [(form, [v.code for v in broken]) for form, broken in verdict.ruled_out][-1] == (
        "static", ["alltoall.max_rows"]
    )  # fmt: skip
    *there, back = sizes(graph, c10d.all_to_all_single.default, True)  # rows, scales, counts; results last
    other = lowered(quantisation, "allgather", dtype, **fields)
    gathered = received(other, dtype, fields)
    (reduced,) = sizes(other, c10d.reduce_scatter_tensor.default, True)
    slots = TOKENS * TOP_K
    row = HIDDEN + 4 if quantisation in ("w8a8", "w4a8") else HIDDEN * dtype.itemsize
    expected = [sum(there), back, slots * row, slots * HIDDEN * dtype.itemsize, gathered, reduced]
    found, note = figures(graph)
    assert found == pytest.approx([size / MB for size in expected], abs=0.051), note
    assert len(there) == (3 if quantisation in ("w8a8", "w4a8") else 2)
    assert ("which is less" in note) == (gathered + reduced < sum(there) + back)


def test_the_figures_of_8_bit_weights_in_full() -> None:
    """By hand: 4,096 tokens of 2,048 bytes, a scale, 4 ids and 4 weights there; 4,096 bytes of each back; a quarter own."""
    found, note = figures(lowered("w8a8", "alltoall"))
    by_hand = [4096 * (2052 + 4 * 8), 4096 * 4096, 1024 * (2052 + 4 * 8), 1024 * 4096]
    assert found == [round(size / MB, 1) for size in by_hand]
    assert note.startswith("equal splits send every token to every rank, as AllGather does: 8.5 MB per rank")
