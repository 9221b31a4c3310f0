"""The note on what equal splits cost: its figures against the bytes of the collectives in lowered graphs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lowering import moe_experts, testing

EP, EXPERTS, TOP_K, HIDDEN, INNER, TOKENS = 4, 16, 4, 2048, 512, 1024
MIB = 2**20
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
    (note,) = graph.report.blocks[0].notes
    return [float(text) for text in re.findall(r"([\d.]+) MiB", note)], note


CASES = [
    ("none", torch.bfloat16, {}), ("none", torch.float32, {}), ("w8a8", torch.bfloat16, {}), ("w8a8", torch.float16, {}),
    ("w4a8", torch.bfloat16, {}), ("w4a16", torch.bfloat16, {}), ("w8a8", torch.bfloat16, {"max_rows": 5000}),
    ("w8a8", torch.bfloat16, {"tp_size": 2}), ("w8a8", torch.bfloat16, {"equal_tokens": False, "max_tokens": TOKENS}),
]  # fmt: skip


@pytest.mark.parametrize(("quantisation", "dtype", "fields"), CASES, ids=str)
def test_figures_are_those_of_the_graphs(quantisation: str, dtype: torch.dtype, fields: dict[str, Any]) -> None:
    graph = lowered(quantisation, "alltoall", dtype, **fields)
    testing.assert_lowered(graph, comm="alltoall")
    *there, back = sizes(graph, c10d.all_to_all_single.default, True)  # rows, scales, counts; results last
    other = lowered(quantisation, "allgather", dtype, **fields)
    gathers = sizes(other, c10d.all_gather_into_tensor.default, False)
    tp_gather = TOKENS * HIDDEN * dtype.itemsize if "tp_size" in fields else 0  # of results, after both
    received = sum(gathers) - tp_gather
    (reduced,) = sizes(other, c10d.reduce_scatter_tensor.default, True)
    slots = TOKENS // fields.get("tp_size", 1) * TOP_K
    row = HIDDEN + 4 if quantisation in ("w8a8", "w4a8") else HIDDEN * dtype.itemsize
    wanted = [sum(there), back, slots * row, slots * HIDDEN * dtype.itemsize, received, reduced]
    found, note = figures(graph)
    assert found == pytest.approx([size / MIB for size in wanted], abs=0.051), note
    assert len(there) == (3 if quantisation in ("w8a8", "w4a8") else 2)
    assert ("which is less" in note) == (received + reduced < sum(there) + back)


def test_the_figures_of_8_bit_weights_in_full() -> None:
    """By hand: 4 buffers of 1,024 * 4 lines, 2,048 bytes and a scale there, 4,096 bytes back; 16 counts of 8 bytes."""
    found, note = figures(lowered("w8a8", "alltoall"))
    lines = 4 * 1024 * 4
    by_hand = [lines * 2052 + 128, lines * 4096, 4096 * 2052, 4096 * 4096, 4096 * (2052 + 4 * 8), 4096 * 4096]
    assert found == [round(size / MIB, 1) for size in by_hand]
    assert note.startswith(
        "equal splits send 32.1 MiB per rank to the experts and 64.0 MiB back at 1024 tokens, of which"
    )
