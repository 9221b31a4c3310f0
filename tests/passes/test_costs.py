"""What lowered layers cost, by the operators in their graphs: docs/costs.md holds the table, and a kernel more is seen."""

import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moe_lowering.passes.emitter import Emitter
from moe_lowering.report.graph_costs import Cost, node_cost, total_cost

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import costs
from layers import LayerSizes, emitted, lower_layer

aten, npu, c10d = torch.ops.aten, torch.ops.npu, torch.ops._c10d_functional
SMALL = LayerSizes(tokens=8, hidden=1024, intermediate=512, experts=8, top_k=2)


@pytest.fixture(scope="module")
def rows():
    return list(costs.measured())


def test_the_page_has_the_table(rows):
    """A change that adds a kernel, or a pass over a buffer, has to write it down: benchmarks/costs.py --write."""
    page = costs.PAGE.read_text("utf-8")
    assert costs.table(rows) in page
    assert costs.page(rows, page) == page
    assert costs.table([*rows[:-1], costs.Row(1, "none", "x", Cost(1), Cost())]) not in page


KERNELS = {"allgather": 14, "alltoall": 20, "mc2": 5, "fused_mc2": 1}
MEGABYTES = {"allgather": 1_470, "alltoall": 3_256 / 2, "mc2": 1_364, "fused_mc2": 5}


@pytest.mark.parametrize("comm", KERNELS)
def test_a_decode_step_of_deepseek_v3_is_lean(rows, comm):
    found = {row.quantisation: row.layer for row in rows if row.name.split(" ")[0] == comm and row.ep_size == 16}
    assert found["none"].kernels <= KERNELS[comm]
    assert found["none"].moved <= MEGABYTES[comm] * 1e6
    assert found["w8a8"].moved <= found["none"].moved
    if comm in ("mc2", "fused_mc2"):
        assert found["w8a8"].kernels <= KERNELS[comm] - (comm == "mc2")


def test_one_kernel_more_is_counted():
    """The twin of the table: the same layer with one clone more."""
    lowered = lower_layer(SMALL, "allgather", 2)
    nodes, constants = emitted(lowered)
    assert not constants
    (unpermute,) = lowered.gm.graph.find_nodes(op="call_function", target=npu.npu_moe_token_unpermute.default)
    rows = unpermute.args[0]
    with rows.meta["val"].fake_mode, lowered.gm.graph.inserting_before(unpermute):
        clone = lowered.gm.graph.call_function(aten.clone.default, (rows,))
        clone.meta["val"] = rows.meta["val"].clone()
    size = rows.meta["val"].numel() * 2
    assert total_cost([*nodes, clone]) == total_cost(nodes) + Cost(1, 0, 2 * size)


@pytest.mark.parametrize("comm", ["allgather", "alltoall", "mc2"])
def test_a_mask_costs_constants_once_per_graph(comm):
    fields = {"capture": True} if comm == "alltoall" else {}
    plain, masked = (emitted(lower_layer(SMALL, comm, 2, mask=mask, **fields)) for mask in (False, True))
    assert not plain[1] and masked[1]
    assert total_cost(plain[0]).kernels < total_cost(masked[0]).kernels


def built(shapes, make, symbolic=False):
    """The nodes that ``make`` emits from bfloat16 inputs of these shapes."""
    tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
    with FakeTensorMode(shape_env=ShapeEnv()) as fake:
        graph, inputs = Graph(), []
        for number, tensor in enumerate(tensors):
            inputs.append(graph.placeholder(f"x{number}"))
            inputs[-1].meta["val"] = fake.from_tensor(tensor, static_shapes=not symbolic)
        end = graph.output(None)
        emit = Emitter(graph, fake)
        with emit.at(end, inputs[0]):
            make(emit, *inputs)
    return emit.created


BF16, INT = torch.bfloat16, torch.int32
X = ((4, 6), BF16)  # 48 bytes
SINGLE = {
    "view": ([X], lambda e, x: e.call(aten.reshape.default, x, [-1]), Cost()),
    "slice": ([X], lambda e, x: e.call(aten.slice.Tensor, x, 1, 0, 3), Cost()),
    "size": ([X], lambda e, x: e.call(torch.ops.aten.sym_size.int, x, 0), Cost()),
    "reads two": ([X, X], lambda e, x, y: e.call(aten.add.Tensor, x, y), Cost(1, 0, 144)),
    "smaller result": ([X], lambda e, x: e.call(aten.sum.dim_IntList, x, [0]), Cost(1, 0, 60)),
    "constant": ([X], lambda e, x: e.call(aten.full.default, [3], 0, dtype=INT), Cost(1, 0, 12)),
    "in place": ([X], lambda e, x: e.call(aten.fill_.Scalar, x, 0), Cost(1, 0, 96)),
    "exchange": (
        [X],
        lambda e, x: e.call(c10d.wait_tensor.default, e.call(c10d.all_gather_into_tensor.default, x, 2, "")),
        Cost(1, 1, 144, 144),
    ),
    "exchange of pieces": (
        [X],
        lambda e, x: e.call(
            c10d.all_gather_into_tensor.default, e.call(aten.slice.Tensor, x, 1, 0, 3), 2, ""
        ),
        Cost(2, 1, 72 + 48, 72),
    ),
    "list of a tuple": (
        [X],
        lambda e, x: e.item(e.call(aten.split.Tensor, x, 2, 1), 0),
        Cost(),
    ),
    "experts are left out": (
        [X, ((2, 6, 8), BF16), ((2,), torch.int64)],
        lambda e, x, w, n: e.call(
            npu.npu_grouped_matmul.default, [x], [w], group_list=n, split_item=2, group_type=0, group_list_type=1
        ),
        Cost(1, 0, 48 + 16 + 64),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SINGLE)
def test_one_operator(name):
    shapes, make, expected = SINGLE[name]
    assert total_cost(built(shapes, make)) == expected


def test_a_reshape_that_copies_is_a_kernel():
    nodes = built([X], lambda e, x: e.call(aten.reshape.default, e.call(aten.permute.default, x, [1, 0]), [-1]))
    assert total_cost(nodes) == Cost(1, 0, 96)


def test_a_size_that_is_not_known_is_an_error():
    (node,) = built([X], lambda e, x: e.call(aten.neg.default, x), symbolic=True)
    with pytest.raises(
        ValueError, match=r"node_cost: neg_default has a tensor of shape .*; accepted: sizes that are known"
    ):
        node_cost(node)
