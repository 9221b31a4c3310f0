"""``lower --fake`` lowers equal layers once: what comes out is what the graph of the whole model gives."""

from __future__ import annotations

import dataclasses
import json
import types

import pytest
import torch
from torch import nn

from moe_lowering import MoE
from moe_lowering.cli.lower import fake, layerwise, trace_progress
from moe_lowering.cli.lower.models import MoeStack
from moe_lowering.cli.lower.request import LowerRequest
from moe_lowering.passes.emission.emitter import is_emitted
from moe_lowering.report import LoweringReport, NotCapturable

# DeepSeek-V3's first three layers have no experts
REQUEST = LowerRequest(model="deepseek_v3", fake=True, ep=16, tokens=64, layers=5, comm="mc2")
VARYING = ("pass_ms", "nodes_before", "nodes_after")


def lowered(request, monkeypatch, told=None):
    """(JSON, what the pass emitted, by traced graph, facts, reports); messages of progress are added to ``told``."""
    graphs, backend = [], fake.lowering_backend

    def keep(gm, *_):
        nodes = [node for node in gm.graph.nodes if is_emitted(node)]
        graphs.append([(str(node.target), describe(node.meta.get("val"))) for node in nodes])

    with monkeypatch.context() as patch:
        patch.setattr(fake, "lowering_backend", lambda lowering, stop: backend(lowering, keep, stop))
        outcome = fake.lower_fake(request, told.append if told is not None else lambda text: None)
    torch._dynamo.reset()
    return json.loads(outcome.to_json()), graphs, dict(outcome.facts), outcome.reports


def describe(value):
    if isinstance(value, (list, tuple)):
        return [describe(each) for each in value]
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value


def test_a_layer_by_itself_is_lowered_as_in_the_whole(monkeypatch):
    told, told_of_whole = [], []
    monkeypatch.setattr(trace_progress, "EVERY", 0.0)
    one, graphs, facts, reports = lowered(REQUEST, monkeypatch, told)
    whole, (whole_graph,), whole_facts, whole_reports = lowered(
        dataclasses.replace(REQUEST, whole=True), monkeypatch, told_of_whole
    )
    assert "kind 1 of 1, model.layers.3 for 2 equal layers up to model.layers.4: tracing with dynamo" in told
    assert "the whole model, 5 layers (--whole): tracing with dynamo" in told_of_whole
    ends = [
        next(each for each in messages if each.endswith("nodes; AOTAutograd reads them twice, then the pass"))
        for messages in (told, told_of_whole)
    ]
    assert "kind" in ends[0] and "kind" not in ends[1]
    # of every node, as nothing is held back here: each layer once more for each stage
    for stage in ("dynamo", "AOTAutograd"):
        begin = f"the whole model, 5 layers (--whole): {stage} is at "
        places = [each.removeprefix(begin).partition(" (")[0] for each in told_of_whole if each.startswith(begin)]
        layers = [place for place in dict.fromkeys(places) if place != trace_progress.OUTSIDE]
        assert layers == [f"model.layers.{n}" for n in range(5)]
        assert trace_progress.OUTSIDE in places, "embeddings and the head"
        counts = [int(each.rpartition("(")[2].split()[0]) for each in told_of_whole if each.startswith(begin)]
        assert counts == list(range(1, len(counts) + 1)), "every node was seen"
    assert facts["lowered"] == "model.layers.3 for 2 equal layers up to model.layers.4"
    assert whole_facts["lowered"] == "the graph of the whole model: --whole"
    assert [block["name"] for block in one["blocks"]] == [f"model.layers.{n}.mlp.experts" for n in (3, 4)]
    for fields in (one, whole):
        assert fields["nodes_before"] > 0 and fields["pass_ms"] > 0
    assert {k: v for k, v in one.items() if k not in VARYING} == {k: v for k, v in whole.items() if k not in VARYING}
    assert reports[0].routers == whole_reports[0].routers and len(reports[0].routers) == 2
    assert len(graphs) == 1, "equal layers are traced once"
    agreement = [node for node in whole_graph if "assert_agreement" in node[0]]
    assert graphs[0] * 2 == whole_graph and len(graphs[0]) > 10, agreement
    assert one["nodes_before"] < whole["nodes_before"] / 2


def test_a_trace_is_told_now_and_then_and_nothing_stays_wrapped(monkeypatch):
    from torch._dynamo.output_graph import SubgraphTracer
    from torch.fx.experimental.symbolic_shapes import PropagateUnbackedSymInts

    methods = [(SubgraphTracer, "create_proxy"), (PropagateUnbackedSymInts, "run_node")]
    before = [holder.__dict__.get(name) for holder, name in methods]
    told = []
    with pytest.raises(ZeroDivisionError), trace_progress.told(told.append):
        assert all(holder.__dict__[name] is not own for (holder, name), own in zip(methods, before, strict=True))
        compiled = torch.compile(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), backend="eager", fullgraph=True)
        assert compiled(torch.ones(1, 2)).shape == (1, 2)
        1 / 0  # noqa: B018
    assert [holder.__dict__.get(name) for holder, name in methods] == before
    assert not told, "a short trace says nothing"
    monkeypatch.setitem(torch._dynamo.output_graph.__dict__, "SubgraphTracer", None)
    with trace_progress.told(told.append):
        assert PropagateUnbackedSymInts.__dict__["run_node"] is not before[1], "of a stage that is another, nothing"


def test_a_method_that_is_inherited_is_inherited_again():
    child = type("Child", (nn.Module,), {})
    seen = []
    with trace_progress._wrapped(child, "extra_repr", types.SimpleNamespace(see=lambda given, made: seen.append(made))):
        assert child().extra_repr() == "" and seen == [""]
    assert "extra_repr" not in child.__dict__


@pytest.mark.parametrize(("path", "layer"), [
    ("L['self'].model.layers.12.mlp.experts", "model.layers.12"),
    ("L['self'].model.layers['3'].mlp", "model.layers['3']"),
    ("L['self'].0.experts", ""),
    ("L['self'].model.embed_tokens", ""),
    ("L['self'].blocks.1.layers.2", "blocks.1"),
])  # fmt: skip
def test_the_layer_of_a_node(path, layer):
    node = torch.fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"outer": ("L['self']", nn.Module), "inner": (path, nn.Module)}
    assert trace_progress.layer_of(node) == layer
    assert trace_progress.layer_of(torch.fx.Graph().placeholder("x")) == ""


def test_a_model_whose_layers_cannot_be_told_apart_from_it_is_traced_as_a_whole(monkeypatch):
    request = LowerRequest(model="moe", fake=True, tokens=8, layers=2)

    def fail(kinds, run):
        raise TypeError("no data")

    with monkeypatch.context() as patch:
        patch.setattr(layerwise, "calls_of", fail)
        whole, graphs, facts, _ = lowered(request, monkeypatch)
    assert facts["lowered"] == (
        "the graph of the whole model: it does not run by itself under fake tensors (TypeError)"
    )
    one, _, facts, _ = lowered(request, monkeypatch)
    assert facts["lowered"] == "layers.0 for 2 equal layers up to layers.1"
    assert one["blocks"] == whole["blocks"] and len(graphs) == 1


def stack(layers=3):
    with torch.device("meta"):
        return MoeStack(16, 8, 16, 2, layers, torch.float32)


def with_layer(model, at, layer):
    model.layers[at] = layer
    return model


def test_what_keeps_a_layer_from_being_captured_is_told_of_all_equal_layers():
    found = NotCapturable("unit.mlp.experts", "", "aten::nonzero", "capture.sizes", "sizes are data", "")
    report = LoweringReport((), (), 1, 1, 0.0, not_capturable=(found,))
    kind = layerwise.UnitKind(("layers.3", "layers.4"), nn.Identity())
    places = [each.place for each in layerwise.spread([kind], [report]).not_capturable]
    assert places == ["layers.3.mlp.experts", "layers.4.mlp.experts"]


def test_equal_layers_are_one_kind():
    (kind,) = layerwise.unit_kinds(stack())
    assert kind.names == ("layers.0", "layers.1", "layers.2")


@pytest.mark.parametrize(
    "change",
    [
        lambda model: with_layer(model, 1, MoE(16, 8, 8, 2)),
        lambda model: with_layer(model, 1, MoE(16, 4, 16, 2)),
        lambda model: setattr(model.layers[1], "top_k", 1),
        lambda model: setattr(model.layers[1], "anything", object()),
        lambda model: model.layers[1].double(),
        lambda model: model.layers[1].add_module("more", nn.Identity()),
        lambda model: model.layers[1].register_forward_hook(lambda *_: None),
    ],
    ids=["experts", "intermediate", "a setting", "an object of its own", "dtype", "another module", "a hook"],
)
def test_layers_that_differ_are_kinds_of_their_own(change):
    model = stack()
    change(model)
    kinds = layerwise.unit_kinds(model)
    assert [kind.names for kind in kinds] == [("layers.0", "layers.2"), ("layers.1",)]


def test_the_index_of_a_layer_is_no_difference_and_another_number_is():
    model = stack()
    for at, layer in enumerate(model.layers):
        layer.layer_idx = at
    assert len(layerwise.unit_kinds(model)) == 1
    for at, layer in enumerate(model.layers):
        layer.window = at
    assert len(layerwise.unit_kinds(model)) == 3


def test_a_module_in_no_list_has_no_unit():
    assert layerwise.unit_kinds(MoE(16, 8, 16, 2)) == []


def test_only_the_layers_up_to_the_last_new_kind_run():
    ran = []

    class Noted(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.mlp, self.ran = layer, ran

        def forward(self, x):
            ran.append(self.mlp.top_k)
            return x

    model = stack()
    model.layers = nn.ModuleList(map(Noted, model.layers))
    model.layers[1].mlp.top_k = 1
    model.norms, model.embedding = nn.ModuleList(nn.Identity() for _ in range(3)), nn.Identity()
    x = torch.zeros(2, 16)
    calls = layerwise.calls_of(layerwise.unit_kinds(model), lambda: model(x))
    assert ran == [2] and set(calls) == {"layers.0", "layers.1"}
    assert calls["layers.1"].of(lambda given: given.shape) == (2, 16)
    assert all(not layer._forward_pre_hooks for layer in model.layers)
