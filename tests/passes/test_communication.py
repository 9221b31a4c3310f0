"""Whether an operator communicates: every one that is registered, against what its name says."""

import pytest
import torch
from torch.fx import Graph

from moe_lowering.backends import ge_rewrites
from moe_lowering.passes.graph.communication import communicates, may_communicate

# Words of exchanges in the names of torch's and torch_npu's operators, by what the operators are known to do.
EXCHANGES = {
    "_c10d_functional": [
        "all_gather_into_tensor",
        "all_reduce",
        "all_to_all_single",
        "broadcast",
        "reduce_scatter_tensor",
    ],
    "c10d": ["allreduce_", "barrier", "send"],
    "npu_define": ["all_to_all_single_npu", "allgather", "broadcast"],
    "npu": [
        "npu_moe_distribute_dispatch",
        "npu_moe_distribute_dispatch_v2",
        "npu_moe_distribute_combine",
        "npu_moe_distribute_combine_v2",
        "npu_mm_all_reduce_base",
        "npu_all_gather_base_mm",
        "npu_alltoallv_gmm",
        "npu_gmm_alltoallv",
        "_npu_distribute_barrier",
    ],
    "moe_lowering": ["dispatch", "combine", "alltoall_experts", "dispatch_ffn_combine", "mega_moe"],
}
STAYS = {
    "_c10d_functional": ["wait_tensor"],
    "npu": ["npu_grouped_matmul", "npu_moe_init_routing_v2", "npu_moe_gating_top_k", "npu_dynamic_quant"],
    "aten": ["mm", "index_select", "copy_", "native_group_norm"],
    "moe_lowering": ["route", "grouped_mlp", "assert_agreement", "assert_tokens", "keep_alive", "ge_keep"],
}
# Of those that stay: what a shared expert must not hold either, since it waits or may be part of a block
MAY = {("_c10d_functional", "wait_tensor"), ("moe_lowering", "route"), ("moe_lowering", "grouped_mlp")}
TENSOR = torch.empty(1)


def call(namespace, name):
    import torchair  # noqa: F401  # it defines npu_define

    return Graph().call_function(getattr(getattr(torch.ops, namespace), name).default)


@pytest.mark.parametrize(("namespace", "name"), [(space, name) for space, names in EXCHANGES.items() for name in names])
def test_operators_that_exchange(namespace, name):
    node = call(namespace, name)
    assert communicates(node) and may_communicate(node)


@pytest.mark.parametrize(("namespace", "name"), [(space, name) for space, names in STAYS.items() for name in names])
def test_operators_that_stay_on_their_rank(namespace, name):
    node = call(namespace, name)
    assert not communicates(node) and may_communicate(node) == ((namespace, name) in MAY)


def test_an_operator_that_nobody_knows_is_told_by_its_arguments():
    """The twins differ in the type or the name of one argument."""
    library = torch.library.Library("unknown_exchanges", "DEF")
    library.define("names(Tensor x, str my_group) -> Tensor")
    library.define("counts(Tensor x, int my_group) -> Tensor")
    library.define("words(Tensor x, str mode) -> Tensor")
    found = [communicates(call("unknown_exchanges", name)) for name in ("names", "counts", "words")]
    library._destroy()
    assert found == [True, False, False]


def test_a_function_is_no_operator():
    node = Graph().call_function(torch.add)
    assert not communicates(node) and not may_communicate(node)


@pytest.mark.parametrize(
    ("namespace", "name", "result", "is_read", "kept"),
    [
        ("npu", "npu_mm_all_reduce_base", TENSOR, False, 1),  # of the model's own, and named by no rule of the lowering
        ("npu", "npu_mm_all_reduce_base", TENSOR, True, 0),
        ("npu", "npu_all_gather_base_mm", (TENSOR, TENSOR), False, 1),
        ("npu", "_npu_distribute_barrier", None, False, 0),  # there is nothing that an output could depend on
        ("npu", "npu_dynamic_quant", TENSOR, False, 0),
        ("moe_lowering", "dispatch_ffn_combine", TENSOR, False, 0),  # its converter keeps it
    ],
)
def test_ge_keeps_what_communicates_and_is_not_read(namespace, name, result, is_read, kept):
    graph = Graph()
    node = graph.call_function(call(namespace, name).target)
    node.meta["val"] = result
    graph.output(node if is_read else None)
    ge_rewrites.keep_communication(graph)
    assert len(graph.find_nodes(op="call_function", target=torch.ops.moe_lowering.ge_keep.default)) == kept
