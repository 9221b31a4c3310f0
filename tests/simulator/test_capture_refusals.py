"""What cannot be captured: refused by a capture with the operator and the model's line, and never chosen by the judge.

That the pass says so before a backend sees the graph: test_capturability.py.
"""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lowering import Deployment, MoE, MoeLowering, npugraph_ex_options, simulator, testing
from moe_lowering.report.text import render
from moe_lowering.simulator.device import CaptureError
from moe_lowering.vocabulary import COMMS


@pytest.fixture(scope="module", autouse=True)
def enabled():
    simulator.enable_device()


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


class Planted(nn.Module):
    """A MoE layer after which the host is asked for something. (A float of item stays a tensor in a compiled graph.)"""

    def __init__(self, what):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.what = MoE(64, 32, 8, 2), what

    def forward(self, x):
        y = self.layer(x)  # planted layer
        if self.what == "item":
            y = y * (y > 0).sum().item()  # planted item
        if self.what == "branch" and y.abs().max().item() > 1:  # planted branch
            y = y * 2
        if self.what == "cpu":
            y = y + y.cpu().to("npu")  # planted cpu
        return y + 1


OPERATORS = {"item": "aten::_local_scalar_dense", "cpu": "aten::copy_"}
LINES = {
    what: number
    for number, text in enumerate(Path(__file__).read_text().splitlines(), 1)
    for what in (*OPERATORS, "branch", "layer")
    if text.endswith(f"# planted {what}")
}


def tokens():
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(1)).npu()


def compiled(model, **options):
    given = npugraph_ex_options(Deployment(), **options)
    return torch.compile(model, backend="npugraph_ex", fullgraph=True, options=given)


def assert_names_the_line(error, what):
    assert error.operator == OPERATORS[what]
    assert (error.place.file, error.place.line) == (__file__, LINES[what])
    assert error.operator in str(error) and f"{__file__}:{LINES[what]}" in str(error)


@pytest.mark.parametrize("what", OPERATORS)
def test_a_lowered_model_that_asks_the_host_is_refused(what):
    """Without a graph, and without the planted line, the same model runs."""
    model = Planted(what).to("npu")
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        with pytest.raises(CaptureError) as caught:
            compiled(model)(tokens())
        assert_names_the_line(caught.value, what)
        torch._dynamo.reset()
        torch.testing.assert_close(compiled(model, force_eager=True)(tokens()), model(tokens()), rtol=1e-4, atol=1e-4)
    plain, before = Planted("").to("npu"), simulator.device.counts()
    torch.testing.assert_close(compiled(plain)(tokens()), plain(tokens()))
    assert (simulator.device.counts() - before).captured == 1


@pytest.mark.parametrize("what", OPERATORS)
def test_a_capture_by_hand_is_refused_too(what):
    x = tokens()

    def function():
        if what == "item":
            return x * x.max().item()
        return x + x.cpu().to("npu")

    with pytest.raises(CaptureError) as caught, torch.npu.graph(torch.npu.NPUGraph()):
        function()
    first = function.__code__.co_firstlineno
    assert caught.value.operator == OPERATORS[what]
    assert caught.value.place.file == __file__ and caught.value.place.line == first + (2 if what == "item" else 3)


def test_dynamo_names_the_line_of_a_branch_on_a_value():
    """Such a model is not even one graph."""
    with pytest.raises(torch._dynamo.exc.UserError) as caught:
        compiled(Planted("branch").to("npu"))(tokens())
    assert f'{__file__}", line {LINES["branch"]}' in str(caught.value)


# Blocks that were not lowered

NO_KERNEL = "has no kernel on a device, as its block was not lowered"


def graphs_of(model, what):
    """The layer in an NPU graph: without the pass, with a pass that leaves it, or by hand."""
    if what == "by hand":
        x = tokens()
        with torch.npu.graph(torch.npu.NPUGraph()):
            model(x)
    elif what == "no pass":
        torch.compile(model, backend="npugraph_ex", fullgraph=True)(tokens())
    else:
        lowering = MoeLowering(Deployment(), "mc2")  # which wants two ranks
        options = npugraph_ex_options(Deployment(), lowering=lowering)
        try:
            torch.compile(model, backend="npugraph_ex", fullgraph=True, options=options)(tokens())
        finally:
            assert [block.comm for block in lowering.reports[0].blocks] == [None]


@pytest.mark.parametrize("what", ["no pass", "not legal", "by hand"])
def test_a_block_that_was_not_lowered_is_refused_with_its_line(what):
    """On device npu it computes, which is a convenience of the simulator; the same model, lowered, is captured."""
    model = Planted("").to("npu")
    assert model(tokens()).isfinite().all().item()
    with pytest.raises(CaptureError, match=NO_KERNEL) as caught:
        graphs_of(model, what)
    assert caught.value.operator == "moe_lowering::route"
    assert (caught.value.place.file, caught.value.place.line) == (__file__, LINES["layer"])
    torch._dynamo.reset()
    before = simulator.device.counts()
    compiled(model)(tokens())
    assert (simulator.device.counts() - before).captured == 1


class Calls(TorchDispatchMode):
    """The calls of our operators."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "moe_lowering":
            self.seen.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def test_every_generic_operator_is_refused():
    model = Planted("").to("npu")
    with Calls() as calls:
        model(tokens())
    names = [func._schema.name.partition("::")[2] for func, _, _ in calls.seen if "assert" not in func._schema.name]
    assert names == ["route", "dispatch", "grouped_mlp", "combine"]
    for func, args, kwargs in calls.seen:
        if "assert" in func._schema.name:  # a device has it
            with torch.npu.graph(torch.npu.NPUGraph()):
                func(*args, **kwargs)
            continue
        refused = pytest.raises(CaptureError, match=f"{func._schema.name}: {NO_KERNEL}")
        with refused, torch.npu.graph(torch.npu.NPUGraph()):
            func(*args, **kwargs)


# The judge


def lowered(comm, **fields):
    """A MoE layer on four ranks that are not there."""
    with testing.fake_deployment(ep_size=4, **fields) as deployment, testing.fake_tensors():
        layer = MoE(1024, 128, 12, 3, deployment=deployment, dtype=torch.bfloat16)
        lowering = MoeLowering(deployment, comm)
        return testing.lower_graph(
            layer, torch.empty(6, 1024, dtype=torch.bfloat16), deployment=deployment, lowering=lowering
        )


EXACT = "moe_lowering.alltoall_experts"


@pytest.mark.parametrize("comm", COMMS)
def test_a_graph_that_is_captured_never_holds_the_exact_form(comm):
    (block,) = lowered(comm, max_tokens=64).report.blocks
    assert block.comm == (comm if comm != "auto" else "allgather") and EXACT not in block.ops_after
    assert block.verdicts["alltoall"].form == "static" and block.verdicts["alltoall"].legal


def test_without_capture_the_exact_form_is_chosen():
    (block,) = lowered("alltoall", capture=False).report.blocks
    assert block.comm == "alltoall" and block.verdicts["alltoall"].form == "exact" and EXACT in block.ops_after


@pytest.mark.parametrize(
    ("fields", "codes"),
    [({}, {"alltoall_exact.capture"}), ({"mode": "ge", "capture": False}, {"alltoall_exact.ge_mode"})],
)
def test_the_verdict_says_why_not_the_exact_form(fields, codes):
    """Beside a legal static form, and beside forms that are refused for reasons of their own: ``max_rows`` is less than what
    one rank may send to another, and a rank may have no token to fill a buffer from."""
    (block,) = lowered("alltoall", **fields).report.blocks
    verdict = block.verdicts["alltoall"]
    ((form, violations),) = verdict.ruled_out
    assert (block.comm, verdict.form, form, {v.code for v in violations}) == ("alltoall", "static", "exact", codes)
    assert {v["code"] for v in verdict.to_json()["ruled_out"]["exact"]} == codes
    (code,) = codes
    assert f"nor exact         [{code}]" in render(lowered("alltoall", **fields).report)
    refused = lowered("alltoall", **fields, equal_tokens=False, min_tokens=0, max_tokens=8, max_rows=3).report
    verdict = refused.blocks[0].verdicts["alltoall"]
    assert {v.code for v in verdict.violations} == {"alltoall.max_rows"} and verdict.form == "static"
    assert {v.code for v in verdict.ruled_out[0][1]} == codes and f"nor exact         [{code}]" in render(refused)


def test_without_capture_no_form_is_ruled_out():
    (block,) = lowered("alltoall", capture=False).report.blocks
    assert all(verdict.ruled_out == () for verdict in block.verdicts.values())
    assert "ruled_out" not in block.verdicts["alltoall"].to_json()


def test_a_deployment_without_capture_is_not_given_to_a_backend_that_captures():
    with pytest.raises(ValueError, match=r"deployment\.capture is False, and npugraph_ex captures the graph"):
        npugraph_ex_options(Deployment(capture=False))
    assert npugraph_ex_options(Deployment(capture=False), force_eager=True)["force_eager"]
