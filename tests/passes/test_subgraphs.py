"""MoE inside of graphs inside of a graph: lowered where it is known how they run, else told with a code."""

from pathlib import Path

import pytest
import reference
import torch
from torch import nn
from torch._higher_order_ops.map import map as map_over
from torch.fx import Graph, GraphModule

import moe_lowering
from moe_lowering import Deployment, MoeLowering, testing
from moe_lowering.backends.aot import lowering_backend
from moe_lowering.passes.operands import COMPUTED_OUTSIDE, is_stored
from moe_lowering.passes.pipeline import LoweringError
from moe_lowering.passes.run.subgraphs import CODES, MAY_DIFFER, RUNS_ONCE, find_subgraphs
from moe_lowering.passes.verifier import generic_nodes

GENERIC = "moe_lowering.dispatch"


class Inside(nn.Module):
    """A MoE layer, called in a graph of its own."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.how = moe_lowering.MoE(32, 16, 8, 2), how

    @torch.compiler.nested_compile_region
    def region(self, x):
        return x + self.layer(x)

    def forward(self, x):
        if self.how == "region":
            return self.region(self.region(x))
        if self.how == "cond":
            return torch.cond(x.sum() > 0, self.layer, lambda x: x + 1, (x,))
        if self.how == "map":
            return map_over(self.layer, x[None])
        return self.layer(x)


HOW = {"region": "invoke_subgraph", "cond": "cond", "map": "map_impl"}


def tokens():
    return torch.rand(5, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("how", HOW)
def test_a_block_inside_is_lowered_and_right(how):
    model = Inside(how).eval()
    lowering = MoeLowering(Deployment(max_tokens=64), "allgather", strict=True)
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(
        model, backend=lowering_backend(lowering, lambda gm, *_: graphs.append(gm)), fullgraph=True
    )
    with torch.no_grad():
        reference.assert_near(compiled(tokens()), model(tokens()), torch.float32)
    (report,) = lowering.reports
    (block,) = report.blocks  # two calls share one graph
    assert block.comm == "allgather" and HOW[how] in block.notes[-1] and ("2 x" in block.notes[-1]) == (how == "region")
    inner = [sub.gm for sub in find_subgraphs(graphs[0], Deployment())]
    assert inner and not any(generic_nodes(gm.graph.nodes) for gm in inner)
    again = MoeLowering(Deployment(), strict=True)
    again(graphs[0])
    assert again.reports[0].blocks == () and again.reports[0].fully_lowered


def test_the_range_of_tokens_is_enforced_inside():
    model = Inside("map").eval()
    lowered = testing.lower_graph(model, tokens(), deployment=Deployment(max_tokens=64), dynamic=True, strict=True)
    assert "moe_lowering.assert_tokens" in lowered.ops_after and GENERIC not in lowered.ops_after


def expert_parallel(how, **options):
    with testing.fake_deployment(ep_size=2, max_tokens=64) as deployment:
        torch.manual_seed(0)
        model = Inside(how)
        model.layer = moe_lowering.MoE(32, 16, 8, 2, deployment=deployment)
        return testing.lower_graph(model.eval(), tokens(), deployment=deployment, comm="allgather", **options)


@pytest.mark.parametrize("how", ["", *HOW])
def test_exchanges_stay_out_of_what_may_differ_between_ranks(how):
    lowered = expert_parallel(how)
    if HOW.get(how) not in MAY_DIFFER:
        testing.assert_lowered(lowered, comm="allgather", blocks=1)
        return
    testing.assert_refused(lowered, code="subgraph.branch")
    assert not lowered.report.fully_lowered and not lowered.report.blocks and GENERIC in lowered.ops_after
    with pytest.raises(LoweringError, match=r"\[subgraph.branch\] it is inside (cond|map_impl)"):
        expert_parallel(how, strict=True)


@pytest.mark.parametrize("raise_foreign", ["auto", "off"])
def test_transformers_form_inside_a_region_is_raised_or_told(raise_foreign):
    """What is not generic is looked for inside too."""
    from foreign_layers import FOREIGN

    class Foreign(nn.Module):
        @torch.compiler.nested_compile_region
        def region(self, x):
            return FOREIGN["gathered"][1](x)

        def forward(self, x):
            return self.region(x)

    lowering = MoeLowering(Deployment(), raise_foreign=raise_foreign)
    report = testing.lower_graph(Foreign(), tokens(), deployment=Deployment(), lowering=lowering).report
    if raise_foreign == "auto":
        assert [(block.comm, block.raised_from) for block in report.blocks] == [("allgather", "gathered_weights")]
        assert report.fully_lowered
    else:
        assert [layer.code for layer in report.foreign] == ["foreign.gathered_weights"] and not report.fully_lowered


class Merged(nn.Module):
    """Experts in a region, with weights that the graph around computes, or has stored."""

    def __init__(self, merge):
        super().__init__()
        self.layer, self.merge = moe_lowering.MoE(32, 16, 8, 2), merge

    def experts(self, x, w13, w2):
        weights, ids = moe_lowering.route(x[:, :8], 2)
        return moe_lowering.moe_experts(x, weights, ids, w13, w2)

    @torch.compiler.nested_compile_region
    def inner(self, x, w13, w2):
        return self.experts(x, w13, w2)

    @torch.compiler.nested_compile_region
    def outer(self, x, w13, w2):
        return self.inner(self.inner(x, w13, w2), w13, w2)

    def forward(self, x):
        w13 = self.layer.w13 * 2 if self.merge else self.layer.w13
        if x.shape[0] > 5:
            return torch.cond(x.sum() > 0, self.experts, lambda x, w13, w2: x + 1, (x, w13, self.layer.w2))
        return self.outer(self.outer(x, w13, self.layer.w2), w13, self.layer.w2)


@pytest.mark.parametrize("count", [5, 6], ids=["regions", "cond"])
@pytest.mark.parametrize("merge", [True, False])
def test_weights_that_the_graph_around_computes_are_not_stored(merge, count, monkeypatch):
    formats = []
    monkeypatch.setattr(
        "moe_lowering.passes.find_blocks.is_stored", lambda node: formats.append(is_stored(node)) or formats[-1]
    )
    x = torch.cat([tokens(), tokens()])[:count]
    lowered = testing.lower_graph(Merged(merge).eval(), x, deployment=Deployment(weight_format="nz"))
    assert lowered.report.blocks and formats == [not merge, True]  # w13, w2
    inside = [sub.gm for sub in find_subgraphs(lowered.gm, Deployment())]
    assert inside and not any(COMPUTED_OUTSIDE in node.meta for gm in inside for node in gm.graph.nodes)


def nested(operator):
    """A graph that has another one in an attribute, which ``operator`` takes."""
    inner = Graph()
    inner.output(inner.placeholder("x"))
    root = nn.Module()
    root.inner = GraphModule(nn.Module(), inner)
    outer = Graph()
    x, attribute = outer.placeholder("x"), outer.get_attr("inner")
    outer.output(outer.call_function(operator, (attribute, x)))
    return GraphModule(root, outer)


def operator_names():
    return sorted({op._name for op in torch._ops._higher_order_ops.values()})


@pytest.mark.parametrize("name", operator_names())
def test_every_higher_order_operator_has_an_answer(name):
    """Only those that are known to run their graph where it stands are lowered in."""
    operator = next(op for op in torch._ops._higher_order_ops.values() if op._name == name)
    (one,) = find_subgraphs(nested(operator), Deployment())
    (two,) = find_subgraphs(nested(operator), Deployment(ep_size=2, ep_group="g"))
    expected = {
        name in RUNS_ONCE: ("", ""),
        name in MAY_DIFFER: ("", "subgraph.branch"),
        name not in RUNS_ONCE | MAY_DIFFER: ("subgraph.operator", "subgraph.operator"),
    }[True]
    for found, code in zip((one, two), expected, strict=True):
        assert code in found.refused and bool(code) == bool(found.refused)


def test_looking_that_fails_is_no_success(monkeypatch):
    """The compile goes on, and nothing says that all was lowered; strict mode raises. The twin looks."""
    assert lower(Inside("region")).report.fully_lowered
    monkeypatch.setattr("moe_lowering.passes.pipeline.find_subgraphs", lambda gm, deployment: 1 / 0)
    left = lower(Inside("region"))
    assert not left.report.fully_lowered
    testing.assert_refused(left, code="subgraph.not_looked")
    with pytest.raises(LoweringError, match="not_looked"):
        lower(Inside("region"), strict=True)


def lower(model, **options):
    return testing.lower_graph(model.eval(), tokens(), deployment=Deployment(max_tokens=64), **options)


def test_codes_are_documented():
    text = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    assert all(f"`{code}`" in text for code in CODES)
