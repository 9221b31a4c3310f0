"""What the pass finds that cannot be captured: named with code and line, and in strict mode raised before a backend sees it.

Each planted line has a twin without it, in which nothing is found and which is captured.
"""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from moe_lowering import Deployment, LoweringError, MoE, MoeLowering, npugraph_ex_options, simulator, testing
from moe_lowering.limits import load
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.report.text import render
from moe_lowering.simulator.device import CaptureError, counts

c10d = torch.ops._c10d_functional


@pytest.fixture(scope="module", autouse=True)
def enabled():
    simulator.enable_device()


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    sizes = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}
    with torch.no_grad(), torch._dynamo.config.patch(**sizes):
        yield


@torch.library.custom_op("tests_not_capturable::kept", mutates_args=())
def kept(x: torch.Tensor) -> torch.Tensor:
    """An operator whose result has a size of its own, and which has no tag that says so."""
    return x[x[:, 0] > 0]


@kept.register_fake
def _(x):
    return x.new_empty(torch.library.get_ctx().new_dynamic_size(), x.shape[1])


class Planted(nn.Module):
    """A MoE layer, and after it what cannot be captured, or nothing."""

    def __init__(self, what):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.what = MoE(64, 32, 8, 2), what

    def forward(self, x):
        y = self.layer(x)
        if self.what == "item":
            y = y * (y > 0).sum().item()  # planted item
        if self.what == "cpu":
            y = y + y.cpu().to(y.device)  # planted cpu
        if self.what == "buffer":
            y = y + torch.empty(y.shape).copy_(y, non_blocking=True).sum().to(y.device)  # planted buffer
        if self.what == "nonzero":
            y = y + y.nonzero().sum()  # planted nonzero
        if self.what == "mask":
            y = y + y[y > 0].sum()  # planted mask
        if self.what == "unique":
            y = y + y.unique().sum()  # planted unique
        if self.what == "repeat":
            y = y + y.repeat_interleave((y[:, 0] > 0).long(), 0).sum()  # planted repeat
        if self.what == "custom":
            y = y + kept(y).sum()  # planted custom
        if self.what == "harmless":  # what looks alike: a cast, an index by numbers, a size that is given
            best = y.argmax(-1)
            y = (y.half()[best % y.shape[0]] + y.repeat_interleave(best * 0 + 1, 0, output_size=6)).float()
        return y + 1


FOUND = {
    "item": ("capture.host_sync", "aten::_local_scalar_dense"),
    "cpu": ("capture.host_copy", "aten::_to_copy"),
    "buffer": ("capture.host_copy", "aten::copy"),
    "nonzero": ("capture.data_dependent_size", "aten::nonzero"),
    "mask": ("capture.data_dependent_size", "aten::index"),
    "unique": ("capture.data_dependent_size", "aten::_unique2"),
    "repeat": ("capture.data_dependent_size", "aten::repeat_interleave"),
    "custom": ("capture.data_dependent_size", "tests_not_capturable::kept"),
}
LINES = {
    what: number
    for number, text in enumerate(Path(__file__).read_text().splitlines(), 1)
    for what in FOUND
    if text.endswith(f"# planted {what}")
}


def tokens():
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(1))


def compiled(model, lowering, **options):
    given = npugraph_ex_options(lowering.deployment, lowering=lowering, **options)
    return torch.compile(model, backend="npugraph_ex", fullgraph=True, options=given)


def assert_found(findings, what):
    (finding,) = findings
    assert (finding.code, finding.operator) == FOUND[what]
    assert finding.line.startswith(f"{__file__}:{LINES[what]} in forward: y = y ") and finding.advice


class Backend(Exception):
    """Raised where the backend goes on with the graph."""


@pytest.fixture
def seen(monkeypatch):
    """What npugraph_ex does next is counted, and nothing more is done."""
    from npugraph_ex._acl_concrete_graph.fx2acl_converter import AclConcreteGraph

    graphs = []

    def optimise(self, *args, **kwargs):
        graphs.append(self)
        raise Backend

    monkeypatch.setattr(AclConcreteGraph, "optimize_graph_without_runtime", optimise)
    return graphs


@pytest.mark.parametrize("what", FOUND)
def test_strict_mode_raises_before_the_backend_sees_the_graph(what, seen):
    strict = MoeLowering(Deployment(), strict=True)
    with pytest.raises(Exception) as caught:
        compiled(Planted(what).to("npu"), strict)(tokens().npu())
    message = str(caught.value)
    assert LoweringError.__name__ in message and "moe_lowering (strict): cannot be captured:" in message
    assert f"[{FOUND[what][0]}]" in message and f"{__file__}:{LINES[what]}" in message
    assert message.count("moe_lowering (strict)") == 1, "npugraph_ex and torchair write it again, below a traceback"
    assert seen == []
    assert_found(strict.reports[0].not_capturable, what)


@pytest.mark.parametrize("what", ["", "harmless"])
def test_the_twin_is_given_to_the_backend(what, seen):
    strict = MoeLowering(Deployment(), strict=True)
    with pytest.raises(Exception, match="Backend"):
        compiled(Planted(what).to("npu"), strict)(tokens().npu())
    assert len(seen) == 1 and strict.reports[0].not_capturable == ()


@pytest.mark.parametrize("what", ["", "harmless"])
def test_the_twin_is_captured(what):
    model, before = Planted(what).to("npu"), counts()
    found = compiled(model, MoeLowering(Deployment(), strict=True))(tokens().npu())
    torch.testing.assert_close(found, model(tokens().npu()), rtol=1e-4, atol=1e-4)
    assert (counts() - before).captured == 1


@pytest.mark.parametrize("what", ["item", "cpu", "nonzero"])
def test_otherwise_it_is_a_warning_and_part_of_the_report(what, caplog):
    lowering = MoeLowering(Deployment())
    with pytest.raises(Exception) as caught, caplog.at_level(logging.INFO, "moe_lowering"):
        compiled(Planted(what).to("npu"), lowering)(tokens().npu())
    assert not isinstance(caught.value, LoweringError)  # it is the capture, or the backend, that fails
    (report,) = lowering.reports
    assert_found(report.not_capturable, what)
    assert [block.comm for block in report.blocks] == ["allgather"]
    (record,) = [r for r in caplog.records if "cannot be captured" in r.message]
    assert record.levelno == logging.WARNING and f"{__file__}:{LINES[what]}" in record.message
    text = " ".join(render(report).split())
    assert "cannot be captured:" in text and f"[{FOUND[what][0]}]" in text and f":{LINES[what]}" in text
    assert report.not_capturable[0].to_json()["code"] == FOUND[what][0]


@pytest.mark.parametrize("what", ["item", "cpu"])
def test_without_a_capture_strict_mode_runs_it(what, caplog):
    """``force_eager`` captures nothing: the report says what an NPU graph would refuse, and nothing fails or warns."""
    lowering, model = MoeLowering(Deployment(), strict=True), Planted(what).to("npu")
    with caplog.at_level(logging.WARNING, "moe_lowering"):
        found = compiled(model, lowering, force_eager=True)(tokens().npu())
    torch.testing.assert_close(found, model(tokens().npu()), rtol=1e-4, atol=1e-4)
    assert_found(lowering.reports[0].not_capturable, what)
    assert not [r for r in caplog.records if "cannot be captured" in r.message]


@pytest.mark.parametrize("fields", [{"capture": False}, {"capture": False, "mode": "ge"}, {"mode": "ge"}])
def test_a_deployment_that_captures_nothing_is_not_looked_at(fields):
    lowered = testing.lower_graph(Planted("nonzero"), tokens(), deployment=Deployment(**fields), strict=True)
    assert lowered.report.not_capturable == () and lowered.report.blocks[0].comm == "allgather"


def on_laptop(what, **options):
    return testing.lower_graph(Planted(what), tokens(), deployment=Deployment(), **options)


def test_on_a_laptop_a_copy_to_the_cpu_is_none_and_the_rest_is_found():
    assert on_laptop("cpu", strict=True).report.not_capturable == ()
    assert_found(on_laptop("item").report.not_capturable, "item")
    found = on_laptop("nonzero")
    assert_found(found.report.not_capturable, "nonzero")
    testing.assert_refused(found, code="capture.data_dependent_size")
    with pytest.raises(AssertionError, match=r"capture\.data_dependent_size"):
        testing.assert_refused(found, code="capture.host_sync")
    with pytest.raises(LoweringError, match=r"\[capture\.data_dependent_size\] aten::nonzero"):
        on_laptop("nonzero", strict=True)


def test_an_input_whose_size_depends_on_data():
    x = tokens()
    torch._dynamo.decorators.mark_unbacked(x, 0)
    lowered = testing.lower_graph(lambda x: x * 2 + 1, x, deployment=Deployment())
    assert {(f.code, f.operator.split()[0]) for f in lowered.report.not_capturable} == {
        ("capture.data_dependent_size", "placeholder")
    }
    torch._dynamo.reset()
    x = tokens()
    torch._dynamo.mark_dynamic(x, 0)
    assert testing.lower_graph(lambda x: x * 2 + 1, x, deployment=Deployment()).report.not_capturable == ()


def test_every_rule_is_one_that_is_found_here():
    """And reads what the pass gives: the operator, and one quantity of its own."""
    rows = [row for row in load() if row.operator == "capture"]
    elsewhere = {"capture.uneven_splits", "capture.exact_splits"}  # below
    assert {row.code for row in rows} == {code for code, _ in FOUND.values()} | elsewhere
    assert all(row.names == {row.value.text, "called"} for row in rows)


# Exchanges between ranks that are not there


def exchanged(function, dynamic=False, **options):
    with testing.fake_deployment(ep_size=4) as deployment:
        x = tokens().repeat(4, 1).flatten()
        return testing.lower_graph(
            lambda x: function(x, deployment.ep_group), x, deployment=deployment, dynamic=dynamic, **options
        )


def equal(x, group):
    return c10d.wait_tensor(c10d.all_to_all_single(x, [x.shape[0] // 4] * 4, [x.shape[0] // 4] * 4, group))


def uneven(x, group):
    return c10d.wait_tensor(c10d.all_to_all_single(x, [x.shape[0] // 4] * 4, [0, 512, 512, 512], group))  # planted


def data_dependent(x, group):
    n = (x > 0).sum().item() // 4
    return c10d.wait_tensor(c10d.all_to_all_single(x.new_zeros(4 * n), [n] * 4, [n] * 4, group))


@pytest.mark.parametrize("dynamic", [False, True])
def test_uneven_splits(dynamic):
    (finding,) = exchanged(uneven, dynamic).report.not_capturable
    assert (finding.code, finding.operator) == ("capture.uneven_splits", "_c10d_functional::all_to_all_single")
    assert "# planted" in finding.line
    assert exchanged(equal, dynamic, strict=True).report.not_capturable == ()
    with pytest.raises(LoweringError, match=r"\[capture\.uneven_splits\]"):
        exchanged(uneven, dynamic, strict=True)


def test_splits_that_depend_on_data():
    codes = [finding.code for finding in exchanged(data_dependent).report.not_capturable]
    assert codes == ["capture.host_sync", "capture.uneven_splits"]


class Exact(nn.Module):
    """A model that calls AllToAll with exact splits itself."""

    def __init__(self, deployment):
        super().__init__()
        self.layer, self.where = MoE(64, 32, 8, 2, deployment=deployment), deployment

    def forward(self, x):
        weights = torch.full((x.shape[0], 2), 0.5)
        ids = torch.arange(2).expand(x.shape[0], 2).to(torch.int32).contiguous()
        experts = [self.layer.w13], [self.layer.w2], [], [], "swiglu", 0.0, 1.702, False, "none", *[None] * 7
        place = 8, self.where.ep_group, self.where.ep_size, 0, 0
        exact = torch.ops.moe_lowering.alltoall_experts
        return exact(x, None, ids, weights, None, *experts, *place)[0]  # planted exact


def test_exact_splits_that_the_model_asks_for():
    with testing.fake_deployment(ep_size=4) as deployment:
        lowered = testing.lower_graph(Exact(deployment), tokens(), deployment=deployment)
        (finding,) = lowered.report.not_capturable
        assert (finding.code, finding.operator) == ("capture.exact_splits", "moe_lowering::alltoall_experts")
        assert "# planted exact" in finding.line
        with pytest.raises(LoweringError, match=r"\[capture\.exact_splits\]"):
            testing.lower_graph(Exact(deployment), tokens(), deployment=deployment, strict=True)
        free = deployment.replace(capture=False)
        assert testing.lower_graph(Exact(free), tokens(), deployment=free, strict=True).report.not_capturable == ()


@pytest.mark.parametrize("comm", [*IMPLEMENTATIONS])
@pytest.mark.parametrize("dynamic", [False, True])
def test_nothing_is_found_in_what_the_pass_emits(comm, dynamic):
    with testing.fake_deployment(ep_size=4, max_tokens=64) as deployment, testing.fake_tensors():
        layer = MoE(1024, 128, 12, 3, deployment=deployment, dtype=torch.bfloat16)
        x = torch.empty(6, 1024, dtype=torch.bfloat16)
        lowered = testing.lower_graph(layer, x, deployment=deployment, comm=comm, strict=True, dynamic=dynamic)
    assert lowered.report.not_capturable == () and lowered.report.blocks[0].comm == comm


def test_the_simulator_agrees():
    """What is found does fail when it is captured."""
    with pytest.raises(CaptureError) as caught:
        compiled(Planted("item").to("npu"), MoeLowering(Deployment()))(tokens().npu())
    assert (caught.value.place.file, caught.value.place.line) == (__file__, LINES["item"])
