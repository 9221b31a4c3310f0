"""ids, weights and scales that travel as columns arrive as they were, for every k, dtype and layout of the weights."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._inductor.fx_passes.post_grad import lazy_init, remove_noop_ops
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule

from moe_lowering import Deployment
from moe_lowering.custom_ops.route import FLOATS
from moe_lowering.passes.emission.emitter import Emitter
from moe_lowering.passes.implementations import columns
from moe_lowering.report.graph_costs import total_cost

TOKENS = 5
LAYOUTS = {
    "dense": lambda t: t,
    "by column": lambda t: t.t().contiguous().t(),
    "from an odd place on": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


def travel(inputs: list[torch.Tensor], dtype: torch.dtype, mode: str) -> tuple[tuple[Any, ...], Any, int]:
    """(what arrives, the columns, kernels) of ids, weights and perhaps scales, in a layer of this dtype."""
    spec: Any = SimpleNamespace(top_k=inputs[0].shape[1], dtype=dtype, experts=64)
    deployment = Deployment(mode=mode)
    graph = Graph()
    with FakeTensorMode() as fake:
        nodes = [graph.placeholder(f"x{number}") for number in range(len(inputs))]
        for node, value in zip(nodes, inputs, strict=True):
            node.meta["val"] = fake.from_tensor(value)
        end = graph.output(None)
        emit = Emitter(graph, fake)
        with emit.at(end, nodes[0]):
            scale = nodes[2] if len(nodes) > 2 else None
            packed = columns.pack_columns(emit, nodes[0], nodes[1], scale, columns.sent_dtype(spec, deployment))
            parts = columns.unpack_columns(emit, packed, spec, deployment, scale is not None)
    end.args = ((*parts, packed),)
    lazy_init()
    remove_noop_ops(graph)  # as npugraph_ex does after our pass
    *arrived, sent = GraphModule({}, graph)(*inputs)
    for node, value in zip(parts, arrived, strict=True):
        assert (node is None) == (value is None)
        assert value is None or (value.is_contiguous() and value.dtype == node.meta["val"].dtype)
    return tuple(arrived), sent, total_cost(emit.created).kernels


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("given", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
def test_what_travels_arrives(dtype: torch.dtype, given: torch.dtype, layout: str, top_k: int) -> None:
    torch.manual_seed(top_k)
    ids = torch.randint(-(2**31), 2**31 - 1, (TOKENS, top_k), dtype=torch.int32)
    weights = LAYOUTS[layout](torch.randn(TOKENS, top_k).to(given))
    weights[0, 0] = torch.nan
    scale = torch.randn(TOKENS)
    for mode in ("npugraph_ex", "ge"):
        used = torch.float32 if mode == "ge" else dtype
        for inputs in ([ids, weights, scale], [ids, weights]):
            arrived, sent, _ = travel(inputs, dtype, mode)
            expected = [ids, weights.to(used), *inputs[2:]]
            for value, right in zip(arrived, expected, strict=False):
                torch.testing.assert_close(value, right, rtol=0, atol=0, equal_nan=True)
            words = top_k * used.itemsize / 4
            assert sent.shape[1] == top_k + (words if words == int(words) else top_k) + len(inputs) - 2


@pytest.mark.parametrize(
    ("given", "top_k", "kernels"), [(torch.float32, 8, 3), (torch.bfloat16, 8, 3), (torch.float32, 3, 3)], ids=str
)
def test_taking_apart_is_one_kernel(given: torch.dtype, top_k: int, kernels: int) -> None:
    """Beside the weights' cast or copy and the ``cat``; in GE graphs it is one for each."""
    inputs = [torch.zeros(TOKENS, top_k, dtype=torch.int32), torch.ones(TOKENS, top_k, dtype=given), torch.ones(TOKENS)]
    assert travel(inputs, torch.bfloat16, "npugraph_ex")[2] == kernels
    assert travel(inputs, torch.bfloat16, "ge")[2] > kernels
