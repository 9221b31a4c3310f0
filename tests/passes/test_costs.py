"""What lowered layers cost, by the operators in their graphs: docs/costs.md holds the table, and a kernel more is seen."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moe_lowering.custom_ops.alltoall_experts import AllToAllExpertsCall
from moe_lowering.passes.costs.tally import peak_bytes
from moe_lowering.passes.emission.emitter import Emitter
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.report.graph_costs import Cost, node_cost, total_cost

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import costs
import fit_costs
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
    """Bytes in every weight format. Quantised tokens travel with their scales: AllGather's kernels are bound without them."""
    found = {
        row.quantisation: row.layer
        for row in rows
        if row.name.split(" ")[0] == comm and row.ep_size == 16 and not row.operator
    }
    assert "none" in found and "w8a8" in found
    assert found["none"].kernels <= KERNELS[comm]
    for name, layer in found.items():
        assert layer.moved <= MEGABYTES[comm] * 1e6, name
    assert found["w8a8"].moved <= found["none"].moved
    if comm in ("mc2", "fused_mc2"):
        assert found["w8a8"].kernels <= KERNELS[comm] - (comm == "mc2")


@pytest.mark.parametrize("comm", ["allgather", "alltoall"])
def test_finalize_routing_takes_four_kernels_less(rows, comm):
    """The bound of 14 kernels in every format, and what it is without the setting: 14, 15 and 16 of AllGather."""
    default, other = (
        {
            row.quantisation: row.layer
            for row in rows
            if row.name.split(" ")[0] == comm and row.ep_size == 16 and row.operator == name
        }
        for name in ("", "finalize_routing")
    )
    more = comm == "alltoall"
    kernels = {"none": 10, "w8a8": 11, "w4a8": 12, "w4a16": 10}
    assert {name: layer.kernels for name, layer in other.items()} == {n: k + more for n, k in kernels.items()}
    assert {name: layer.kernels for name, layer in default.items()} == {n: k + 4 + more for n, k in kernels.items()}
    assert all(layer.moved < default[name].moved for name, layer in other.items())
    assert max(layer.kernels for layer in other.values()) <= KERNELS["allgather"]


def test_finalize_routing_in_ge_mode_is_what_the_page_says():
    def cost(quantisation, operator):
        fields = {"mode": "ge", "unpermute_operator": operator}
        return total_cost(emitted(lower_layer(LayerSizes(), "allgather", 16, quantisation, **fields))[0])

    pairs = [
        [cost(name, operator) for operator in ("finalize_routing", "token_unpermute")] for name in ("none", "w8a8")
    ]
    (bf16, bf16_before), (int8, int8_before) = [[each.kernels for each in pair] for pair in pairs]
    moved = [" MB for ".join(f"{each.moved / 1e6:,.0f}" for each in pair) for pair in pairs]
    in_bf16 = f"AllGather has {bf16} kernels for {bf16_before} in bf16, and moves {moved[0]}."
    page = " ".join(costs.PAGE.read_text("utf-8").split())
    assert f"{in_bf16} In W8A8 it has {int8} for {int8_before}, and moves {moved[1]}." in page


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


def test_reports_count_what_is_in_the_graph(rows):
    """Counted with torch's meta tensors and our own shapes of Ascend operators; the graph has those of torch_npu."""
    for row in rows:
        assert (row.told.kernels, row.told.exchanges, row.told.moved) == (
            row.layer.kernels,
            row.layer.collectives,
            row.layer.moved,
        )
        assert (row.told.name, row.told.once) == (row.name, row.once.kernels)
        assert row.told.sent_within + row.told.sent_between > 0 and row.told.buffers > 0


CASTS = {"allgather": -1, "alltoall": -1, "mc2": 1, "fused_mc2": 1}  # which dtype of routing weights they read


@pytest.mark.parametrize("comm", IMPLEMENTATIONS)
def test_routing_weights_of_16_bits_are_cast_for_those_who_read_others(comm):
    given, halves = (
        lower_layer(dataclasses.replace(SMALL, routing=dtype), comm, 2) for dtype in (torch.float32, torch.bfloat16)
    )
    kernels = [total_cost(emitted(lowered)[0]).kernels for lowered in (given, halves)]
    assert kernels[1] - kernels[0] == CASTS[comm]
    assert [lowered.report.blocks[0].costs[0].kernels for lowered in (given, halves)] == kernels


def test_exact_alltoall_gets_routing_weights_in_float32():
    """In one operator, whose weights are float32; its twin has them so already."""
    for dtype, casts in ((torch.float32, 0), (torch.bfloat16, 1)):
        lowered = lower_layer(dataclasses.replace(SMALL, routing=dtype), "alltoall", 2, capture=False)
        (operator,) = lowered.gm.graph.find_nodes(
            op="call_function", target=torch.ops.moe_lowering.alltoall_experts.default
        )
        weights = AllToAllExpertsCall(*operator.args).weights
        assert weights.meta["val"].dtype == torch.float32
        assert sum(node.target is aten._to_copy.default for node in emitted(lowered)[0]) == casts


COUNTED = [
    ("w8a8", {"mask": True}), ("none", {"max_tokens": 8, "equal_tokens": False}), ("w4a16", {"tp_size": 2, "soc": "A2"}),
    ("w8a8", {"mode": "ge"}), ("w8a8", {"mode": "ge", "unpermute_operator": "finalize_routing"}),
    ("w4a8", {"tp_size": 2, "tokens": 7, "max_rows": 6}), ("none", {"tp_size": 2, "tokens": 7}),
]  # fmt: skip


@pytest.mark.parametrize(("quantisation", "fields"), COUNTED, ids=str)
def test_reports_count_what_is_in_the_graph_of_other_deployments(quantisation, fields):
    fields = dict(fields)
    sizes = dataclasses.replace(SMALL, experts=32, tokens=fields.pop("tokens", 8))
    found = 0
    for comm in IMPLEMENTATIONS:
        if comm == "fused_mc2" and (quantisation == "w4a16" or fields.keys() & {"mask", "soc", "mode"}):
            continue
        lowered = lower_layer(sizes, comm, 4, quantisation, **fields)
        nodes, constants = emitted(lowered)
        (block,) = lowered.report.blocks
        cost, *others = block.costs
        assert cost.implementation == comm and all(block.verdicts[each.implementation].legal for each in others)
        layer = total_cost(node for node in nodes if "assert" not in str(node.target))
        assert (cost.kernels, cost.exchanges, cost.moved) == (layer.kernels, layer.collectives, layer.moved)
        assert cost.outside == layer.moved - layer.exchanged and cost.once == total_cost(constants).kernels
        assert cost.buffers > 0 and cost.us > cost.error_us > 0
        assert json.loads(json.dumps(block.to_json()))["costs"][0] == cost.to_json()
        found += 1
    assert found >= 2


def test_links_within_and_between_nodes_are_told_apart():
    whole, split = (
        lower_layer(SMALL, "allgather", 4, ranks_per_node=ranks).report.blocks[0].costs[0] for ranks in (4, 2)
    )
    assert whole.sent_between == 0 and split.sent_between > split.sent_within > 0
    assert " MB sent within the node, buffers of" in str(whole) and "to other nodes" not in str(whole)
    assert re.search(r"weights, [\d,.]+ MB sent within the node and [\d,.]+ MB to other nodes, buffers", str(split))
    assert "beside weights, sent: " in str(dataclasses.replace(split, sent_within=0))
    assert "beside weights, buffers of" in str(dataclasses.replace(whole, sent_within=0)), "one rank sends nothing"
    assert whole.sent_within == pytest.approx(split.sent_within + split.sent_between, abs=16)
    assert "to other nodes" in str(split) and "to other nodes" not in str(whole)


def test_the_peak_of_buffers_is_what_lives_at_once():
    """x [4, 6] bfloat16, 48 bytes: two results that are read together, after one that no one reads any more."""

    def chain(emit, x):
        first = emit.call(aten.neg.default, x)
        second = emit.call(aten.neg.default, first)
        third = emit.call(aten.neg.default, second)
        emit.call(
            aten.add.Tensor, emit.call(aten.reshape.default, third, [-1]), emit.call(aten.reshape.default, second, [-1])
        )

    assert peak_bytes(built([X], chain)) == 3 * 48
    assert peak_bytes(built([X], lambda e, x: e.call(aten.reshape.default, x, [-1]))) == 0


def test_laws_and_tables_are_what_is_fitted():
    """benchmarks/fit_costs.py --write renews both; the twin has one row that is otherwise."""
    found, sources = fit_costs.published()
    assert fit_costs.toml(found) == fit_costs.FITTED.read_text("utf-8")
    page = costs.PAGE.read_text("utf-8")
    assert fit_costs.page(page, fit_costs.tables(found, sources)) == page
    rows = [row._replace(us=row.us * 2) if at == 3 else row for at, row in enumerate(sources)]
    assert fit_costs.toml(list(fit_costs.fits(rows))) != fit_costs.FITTED.read_text("utf-8")


def test_fitted_laws_are_near_the_published_rows():
    worst = {what: law.error for what, _, _, law in fit_costs.published()[0]}
    assert worst == {
        "matmul_int8": 0.05,
        "dispatch": pytest.approx(0.15, abs=0.02),
        "combine": pytest.approx(0.06, abs=0.02),
    }


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
