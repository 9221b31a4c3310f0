"""``str(report)``, graphs of blocks, JSON schemas, TORCH_TRACE and TORCH_LOGS."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import logging
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from json_schema import problems
from torch._logging._internal import LazyTraceHandler

import moe_lowering
from moe_lowering.passes import trace_artifacts
from moe_lowering.report.leftovers import ForeignMoe
from moe_lowering.report.records import LoweringReport, RouterReport
from moe_lowering.report.schemas import SCHEMA_VERSION, SCHEMAS, schema
from moe_lowering.report.text import render
from moe_lowering.source_lines import innermost

LAYERS = """
import moe_lowering, torch
from moe_lowering import testing
class Two(torch.nn.Module):
    def __init__(self, deployment, **more):
        super().__init__()
        sizes = dict(num_experts=16, top_k=4, deployment=deployment, dtype=torch.bfloat16, **more)
        self.layers = torch.nn.ModuleList(moe_lowering.MoE(1024, 512, **sizes) for _ in range(2))
    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x
with testing.fake_deployment(ep_size=16) as deployment, testing.fake_tensors():
    model, x = Two(deployment), torch.empty(32, 1024, dtype=torch.bfloat16)
    lowered = testing.lower_graph(model, x, deployment=deployment, comm="mc2")
"""


@pytest.fixture(scope="module")
def lowered():
    namespace: dict = {}
    exec(LAYERS, namespace)
    return namespace["lowered"]


@pytest.fixture(scope="module")
def refused():
    namespace: dict = {}
    exec(LAYERS.replace("torch.empty(32", "torch.empty(600"), namespace)
    return namespace["lowered"]


def test_a_report_is_its_text(lowered):
    assert str(lowered.report) == render(lowered.report)
    assert "implementation    mc2" in str(lowered.report)


def test_a_librarys_line_is_told_by_its_place_in_the_library():
    trace = 'File "{}", line 7, in forward\n    y = x'
    library, own = Path(sysconfig.get_paths()["purelib"]) / "transformers/models/x.py", "/home/me/model.py"
    assert str(innermost(trace.format(library))) == "transformers/models/x.py:7 in forward: y = x"
    assert str(innermost(trace.format(own))) == f"{own}:7 in forward: y = x", "the twin: one's own file"


def test_routers_are_told_in_words():
    router = RouterReport("gate", "", "aten", "npu.npu_moe_gating_top_k", "proven equal")
    assert str(router) == "gate: ATen operators became npu.npu_moe_gating_top_k: proven equal"
    left = dataclasses.replace(router, became=None, reason="[router.saturates] why", line="x.py:1 in f")
    assert str(left) == "gate: left as it was: [router.saturates] why; at x.py:1 in f"


def test_graphs_before_and_after(lowered, refused):
    report = lowered.report
    before, after = report.graph_before.splitlines(), report.graph_after.splitlines()
    names = [f"# {block.name}" for block in report.blocks]
    assert (
        [line for line in before if line.startswith("#")] == [line for line in after if line.startswith("#")] == names
    )
    for block in report.blocks:
        for nodes, operators in ((block.nodes_before, block.ops_before), (block.nodes_after, block.ops_after)):
            assert [node.operator for node in nodes if node.operator != "getitem"] == list(operators)
        graph = {node.name: {each.name for each in node.all_input_nodes} for node in lowered.gm.graph.nodes}
        for node in block.nodes_after:
            assert set(node.inputs) == graph[node.name], "as the lowered graph has it"
    assert all(re.fullmatch(r"%\w+ = [\w.]+\(.*\)", line) for line in before + after if not line.startswith("#"))
    assert any("npu.npu_moe_distribute_dispatch_v2(" in line for line in after) and "npu." not in report.graph_before
    assert refused.report.graph_after == refused.report.graph_before != "", "nothing became of it"


# --------------------------------------------------------------------------------------------------------------- schemas


def test_reports_are_as_their_schema_says(lowered, refused):
    assert lowered.report.routers
    layer = ForeignMoe("moe", "", (("aten._grouped_mm", 2),), "foreign.experts", "why", "what to do")
    foreign = LoweringReport((), (("graph", "why"),), 0, 0, 0.0, foreign=(layer,))
    for report in (lowered.report, refused.report, foreign):
        found = report.to_json()
        assert found == json.loads(json.dumps(found)), "lists, as a validator wants them: no tuples"
        assert found["schema_version"] == SCHEMA_VERSION
        assert not problems(found, schema("report"))


def test_an_explanation_is_as_its_schema_says():
    deployment = moe_lowering.Deployment(soc="A3", ep_size=16, ep_group="ep", mc2_group="mc2")
    block = moe_lowering.BlockDescription(hidden=1024, intermediate=512, experts=64, top_k=4)
    found = moe_lowering.explain(block, deployment, tokens=600, sweep=(1, 700)).to_json()
    assert len(found["sweep"]) > 1 and found == json.loads(json.dumps(found)) and not problems(found, schema("explain"))


def changes(value, path=()):
    """(path, what was done, the value with it) of changes, one each, to everything in a JSON value but open objects."""
    if isinstance(value, dict):
        for name, each in value.items():
            without = {other: kept for other, kept in value.items() if other != name}
            yield (*path, name), "left out", without
            for where, what, changed in changes(each, (*path, name)):
                yield where, what, {**value, name: changed}
    elif isinstance(value, list):
        for at, each in enumerate(value[:1]):
            for where, what, changed in changes(each, (*path, at)):
                yield where, what, [*value[:at], changed, *value[at + 1 :]]
    else:
        yield path, "an object", {"other": 1}


# What a schema leaves open: values of rules, names of implementations and of providers.
OPEN = re.compile(r"\.providers\.\w+$|\.(value|buffer|ruled_out)$|\.limit\.|\.verdicts\.\w+$|\.ruled_out\.\w+$")


@pytest.mark.parametrize("which", ["lowered", "refused"])
def test_a_field_that_goes_or_changes_its_kind_is_seen(which, request):
    report = json.loads(json.dumps(request.getfixturevalue(which).report.to_json()))
    report["blocks"] = report["blocks"][:1]
    tried = 0
    for path, what, changed in changes(report):
        where = "." + ".".join(map(str, path))
        if OPEN.search(where):
            continue
        tried += 1
        assert problems(changed, schema("report")), f"{where} {what}"
    assert tried > 100
    more = copy.deepcopy(report)
    more["blocks"][0]["new"] = 1
    assert problems(more, schema("report"))


def test_schemas_are_found_by_name():
    for name in SCHEMAS:
        assert schema(name)["properties"]["schema_version"] == {"const": SCHEMA_VERSION}
    with pytest.raises(ValueError, match="schema is 'reports'; accepted: report, lower, explain"):
        schema("reports")


# ------------------------------------------------------------------------------------------------------- trace and logs


def test_torch_trace_has_the_report_and_the_graphs_and_torch_logs_a_line_for_each_block(tmp_path):
    environment = {**os.environ, "TORCH_TRACE": str(tmp_path), "TORCH_LOGS": "moe_lowering"}
    done = subprocess.run(
        [sys.executable, "-c", LAYERS], capture_output=True, text=True, timeout=300, check=True, env=environment
    )
    (trace,) = tmp_path.iterdir()
    lines = trace.read_text().splitlines()
    found = {}
    for at, line in enumerate(lines):
        if '"artifact": {"name": "moe_lowering_' in line:
            payload = []
            for following in lines[at + 1 :]:
                if not following.startswith("\t"):
                    break
                payload.append(following[1:])
            found[json.loads(line[line.index("{") :])["artifact"]["name"]] = "\n".join(payload)
    assert found.keys() == {trace_artifacts.REPORT, trace_artifacts.BEFORE, trace_artifacts.AFTER}
    assert "implementation    mc2" in found[trace_artifacts.REPORT]
    assert "moe_lowering.dispatch" in found[trace_artifacts.BEFORE]
    assert "npu_moe_distribute_dispatch_v2" in found[trace_artifacts.AFTER]
    said = [line for line in done.stderr.splitlines() if " is mc2: " in line]
    assert len(said) == 2 and all("mc2 was asked for and is legal" in line for line in said)


def test_without_a_trace_nothing_is_written_and_without_logs_nothing_is_said(caplog, monkeypatch):
    """A handler without a directory is no trace, nor are others, as pytest's."""
    idle = [LazyTraceHandler(None), logging.NullHandler(), logging.StreamHandler(io.StringIO())]
    monkeypatch.setattr(trace_artifacts.trace_log, "handlers", idle)
    monkeypatch.setattr(trace_artifacts, "trace_structured", lambda *given, **more: pytest.fail("a trace was taken"))
    with caplog.at_level(logging.WARNING, logger="moe_lowering"):
        exec(LAYERS, {})
    assert not [record for record in caplog.records if " is mc2" in record.getMessage()]
    assert not trace_artifacts.is_traced()
    monkeypatch.setattr(trace_artifacts.trace_log, "handlers", [*idle, LazyTraceHandler("/a/directory")])
    assert trace_artifacts.is_traced()


def test_a_report_that_cannot_be_written_does_not_fail_the_compile(monkeypatch):
    def fail(*given, **more):
        raise RuntimeError("no room")

    monkeypatch.setattr(trace_artifacts, "trace_structured", fail)
    monkeypatch.setattr(trace_artifacts, "is_traced", lambda: True)
    namespace: dict = {}
    exec(LAYERS, namespace)
    assert [block.comm for block in namespace["lowered"].report.blocks] == ["mc2", "mc2"]
