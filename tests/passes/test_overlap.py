"""Shared experts on a side stream: what is moved, how the streams are ordered, what is left in plain order and why."""

import overlap_layers as layers
import pytest
import torch
import torch.nn.functional as F
from overlap_layers import MOVED, Layer, big, without

from moe_lowering import Deployment, MoeLowering, testing
from moe_lowering.passes import overlap, overlap_region

c10d, aten = torch.ops._c10d_functional, torch.ops.aten


class InsideNpugraphEx(MoeLowering):
    """The pass as npugraph_ex calls it, for graphs that are lowered and not run."""

    def __call__(self, gm, example_inputs=None, config=None):
        from npugraph_ex.configs.compiler_config import CompilerConfig

        super().__call__(gm, example_inputs, CompilerConfig())


def lower(module, *args, comm="mc2", inside=True, dynamic=False, strict=True, tokens=8, **fields):
    """A layer lowered over a fake group of two ranks: hidden size 1024, which MC2 wants, and bfloat16."""
    with testing.fake_deployment(**{"ep_size": 2, **fields}) as where:
        module.moe = type(module.moe)(1024, 128, 12, 3, dtype=torch.bfloat16, deployment=where)
        lowering = (InsideNpugraphEx if inside else MoeLowering)(where, comm, strict=strict, overlap=True)
        x = torch.randn(tokens, 1024, dtype=torch.bfloat16)
        lowered = testing.lower_graph(module, x, deployment=where, lowering=lowering, dynamic=dynamic)
    assert [block.comm for block in lowered.report.blocks] == [comm]
    return lowered, lowered.report.blocks[0].notes[-1]


def shared_first(layer, x, h):
    shared = layer.shared(h)
    return layer.moe(h) + shared


def gated(layer, x, h):
    return layer.moe(h).view(2, -1, 1024) + (torch.sigmoid(h[:, :1]) * layer.shared(h)).view(2, -1, 1024)


def third_addition(layer, x, h):
    return (((layer.moe(h) * 2.5) + x) + h) + layer.shared(h)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("join", [None, shared_first, gated, third_addition], ids=lambda j: j and j.__name__)
@pytest.mark.parametrize("comm", ["allgather", "alltoall", "mc2"])
def test_the_shared_expert_is_moved_before_the_first_communication(comm, join, dynamic):
    lowered, note = lower(big(join), comm=comm, dynamic=dynamic)
    assert note == "the shared expert (3 x aten.mm) overlaps dispatch to combine on a side stream"
    assert layers.stream_errors(lowered.gm.graph) == []
    (moved,) = layers.region(lowered.gm.graph)
    assert [name for name in moved if name == "mm"] == ["mm"] * 3
    assert moved == MOVED or join is gated
    names = [getattr(node.target, "_opname", "") for node in lowered.gm.graph.nodes]
    starts = {
        "allgather": "all_gather_into_tensor",
        "alltoall": "all_gather_into_tensor",
        "mc2": "npu_moe_distribute_dispatch_v2",
    }
    assert names[names.index("scope_exit") + 1] == starts[comm]
    assert all("val" in node.meta for node in lowered.gm.graph.nodes if node.op == "call_function")


def test_a_second_run_changes_nothing():
    lowered, _ = lower(big())
    before = lowered.gm.code
    InsideNpugraphEx(Deployment(), overlap=True)(lowered.gm)
    assert lowered.gm.code == before


@pytest.mark.parametrize(("name", "nth", "error"), [
    ("tagged_event_wait", 0, "does not wait for"),
    ("tagged_event_wait", 1, "add_2 does not wait for mm_3"),
    ("keep_alive", 0, "is given back while"),
])  # fmt: skip
def test_every_event_is_needed(name, nth, error):
    lowered, _ = lower(big())
    assert error in "; ".join(without(name, nth, lowered.gm.graph))


# What is left in plain order


def used_elsewhere(layer, x, h):
    shared = layer.shared(h)
    return layer.moe(h) + shared, shared.relu()


def depends(layer, x, h):
    y = layer.moe(h)
    return y + layer.shared(y)


def no_matmul(layer, x, h):
    return layer.moe(h) + F.silu(h)


def nothing_added(layer, x, h):
    return x + layer.moe(h)


def residual_with_a_matmul(layer, x, h):
    r = layer.shared(h)
    return r + layer.moe(r)


def late_input(layer, x, h):
    y = layer.moe(h)
    late = h.sin()
    return y + layer.shared(late), late


def all_reduced(layer, x, h):
    group = layer.moe.moe_lowering_deployment.ep_group
    return layer.moe(h) + c10d.wait_tensor(c10d.all_reduce(layer.shared(h), "sum", group))


def random(layer, x, h):
    return layer.moe(h) + layer.shared(F.dropout(h, 0.5, training=True))


def in_scope(layer, x, h):
    y = layer.moe(h)
    torch.ops.npugraph_ex.scope_enter(["_user_stream_label"], ["mine"])
    shared = layer.shared(h)
    torch.ops.npugraph_ex.scope_exit()
    return y + shared


def all_in_one_scope(layer, x, h):
    torch.ops.npugraph_ex.scope_enter(["_op_aicore_num"], ["4"])
    y = layer.moe(h) + layer.shared(h)
    torch.ops.npugraph_ex.scope_exit()
    return y


def past_a_scope(layer, x, h):
    y = layer.moe(h)
    torch.ops.npugraph_ex.scope_enter(["_op_aicore_num"], ["4"])
    z = h.sin()
    torch.ops.npugraph_ex.scope_exit()
    return y + layer.shared(h), z


@pytest.mark.parametrize(("join", "code"), [
    (used_elsewhere, "used_elsewhere"), (depends, "depends_on_block"), (no_matmul, "no_matmul"),
    (nothing_added, "no_shared_expert"),
    (residual_with_a_matmul, "no_shared_expert"), (late_input, "late_input"), (all_reduced, "communicates"),
    (random, "side_effect"), (in_scope, "scope"), (past_a_scope, "scope"),
    (all_in_one_scope, "scope"),
], ids=lambda v: getattr(v, "__name__", ""))  # fmt: skip
def test_plain_order(join, code):
    lowered, note = lower(big(join))
    assert note.startswith(f"[overlap.{code}] {overlap_region.CODES[f'overlap.{code}']}")
    assert layers.region(lowered.gm.graph) == []
    assert "keep_alive" not in lowered.gm.code and "tagged_event" not in lowered.gm.code


@pytest.mark.parametrize(("options", "code"), [
    ({"comm": "fused_mc2"}, "no_events"),
    ({"comm": "alltoall", "capture": False}, "no_events"),
    ({"inside": False}, "no_streams"),
    ({"comm": "allgather", "mode": "ge"}, "no_streams"),
], ids=["fused_mc2", "exact alltoall", "plain backend", "ge"])  # fmt: skip
def test_plain_order_where_nothing_can_overlap(options, code):
    lowered, note = lower(big(), **options)
    assert note.startswith(f"[overlap.{code}]")
    assert layers.region(lowered.gm.graph) == []


def test_off_unless_asked_for():
    with testing.fake_deployment(ep_size=1) as where:
        lowered = testing.lower_graph(
            Layer(), torch.randn(4, 64), deployment=where, lowering=InsideNpugraphEx(where, "allgather")
        )
    assert layers.region(lowered.gm.graph) == [] and not any("shared" in n for n in lowered.report.blocks[0].notes)


@pytest.mark.parametrize("at", ["moving", "ordering"])
def test_a_failure_is_undone_and_reported(at, monkeypatch):
    plain, _ = lower(big(), inside=False)

    def broken(*_):
        raise KeyError("broken")

    if at == "moving":  # in the middle of moving
        moves, prepend = [], torch.fx.Node.prepend

        def second_fails(self, node):
            moves.append(node)
            broken() if len(moves) == 8 else prepend(self, node)

        original = overlap._edit

        def edit(*arguments):
            with monkeypatch.context() as patched:
                patched.setattr(torch.fx.Node, "prepend", second_fails)
                original(*arguments)

        monkeypatch.setattr(overlap, "_edit", edit)
    else:  # after all was moved
        monkeypatch.setattr(overlap, "_tensors", broken)
    lowered, note = lower(big())
    assert note == "[overlap.failed] plain order: moving the shared expert failed and was undone: KeyError: 'broken'"
    assert lowered.gm.code == plain.gm.code


# The operator that holds memory


def test_keep_alive():
    op = torch.ops.moe_lowering.keep_alive
    torch.library.opcheck(op.default, ([torch.ones(2), torch.ones(3, dtype=torch.int8)],))
    assert op([torch.ones(2)]) is None
    graph = torch.fx.Graph()
    graph.call_function(op.default, ([graph.placeholder("x")],))
    graph.output(())
    graph.eliminate_dead_code()
    assert op.default in [node.target for node in graph.nodes]
