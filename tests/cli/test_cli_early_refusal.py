"""What ``moe-lowering lower`` answers from its options alone, before a model is built."""

from __future__ import annotations

import pytest
import torch
from cli_commands import command, fresh_dynamo  # noqa: F401

from moe_lowering import cli
from moe_lowering.cli import progress
from moe_lowering.cli.assumed_machine import ASSUMED_PROVIDERS
from moe_lowering.cli.commands import parse
from moe_lowering.cli.deployments import make_deployment
from moe_lowering.cli.lower import compare, early_refusal, models, prepare
from moe_lowering.cli.lower.request import LowerRequest


@pytest.fixture(autouse=True)
def progress_is_shown(monkeypatch: pytest.MonkeyPatch):
    """What was begun is told by it."""
    monkeypatch.setattr(progress, "QUIET", 0.0)
    monkeypatch.setattr(progress, "is_terminal", lambda stream: True)


def test_an_illegal_implementation_is_refused_with_its_codes_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """And with what the pass says of the graph, which runs here the second time."""
    given = ("moe", "--comm", "mc2", "--layers", "1", "--tokens", "8")
    real = models.build
    monkeypatch.setattr(models, "build", lambda made, dtype, **more: real(made, dtype, **more).to("meta"))
    code, early, err = command(capfd, *given)
    monkeypatch.setattr(models, "build", real)
    assert code == 1 and "building" not in err
    (block,) = early["blocks"]
    codes = [v["code"] for v in block["verdicts"]["mc2"]["violations"]]
    assert block["comm"] is None and codes == ["mc2.ep_size"]
    assert all(code in err for code in codes)
    assert early["nodes_before"] is early["pass_ms"] is early["max_rel_error"] is None

    monkeypatch.setattr(early_refusal, "find_early_refusal", lambda *_: None)
    code, late, err = command(capfd, *given)
    assert code == 1 and "building" in err
    assert late["blocks"][0]["verdicts"] == block["verdicts"] and late["blocks"][0]["reason"] == block["reason"]
    assert late["max_rel_error"] < compare.TOLERANCE["bfloat16"]  # left as it was, it still computes the same


@pytest.mark.parametrize(
    ("given", "codes"),
    [
        (
            "qwen3_moe --ep 4 --comm fused_mc2 --quant w4a16",
            {"fused.quantisation"},
        ),
        ("gpt_oss --ep 2 --comm fused_mc2", {"fused.activation", "fused.gate_order", "fused.bias"}),
        ("qwen3_moe --comm mc2", {"mc2.ep_size"}),
        ("moe --ep 4 --comm mc2 --tokens 600 --dynamic --dtype float32", {"mc2.x_dtype", "mc2.tokens"}),
    ],
)
def test_codes_from_the_options_are_those_of_the_graph(
    given: str, codes: set[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """A graph that is traced with fake tensors has the same verdicts; T is a symbol with --dynamic."""
    arguments_ = ("--fake", "--layers", "2", *given.split())
    found = []
    for answer in (early_refusal.find_early_refusal, lambda *_: None):
        monkeypatch.setattr(early_refusal, "find_early_refusal", answer)
        torch._dynamo.reset()
        code, report, err = command(capfd, *arguments_)
        assert code == 1
        assert all(err.count(f"[{each}]") == 1 for each in codes), "both ends of an exchange break the same rule"
        found.append(report)
    early, late = found
    asked = given.split()[given.split().index("--comm") + 1]
    assert early["nodes_before"] is None and late["nodes_before"] > 0
    assert [b["name"] for b in early["blocks"]] == [b["name"] for b in late["blocks"]]
    for before, after in zip(early["blocks"], late["blocks"], strict=True):
        assert codes <= {v["code"] for v in before["verdicts"][asked]["violations"]}
        if "--dynamic" not in given:
            assert before["verdicts"] == after["verdicts"] and before["reason"] == after["reason"]


@pytest.mark.parametrize("given", ["qwen3_moe --ep 4 --comm mc2", "moe --ep 4 --comm fused_mc2 --quant w8a8", "moe"])
def test_a_legal_or_open_choice_is_not_answered_beforehand(given: str):
    request = parse(["lower", *given.split()])
    made = models.plan_model(request)
    groups = {"ep_group": "ep", "mc2_group": "mc2"} if request.ep > 1 else {}
    deployment = make_deployment(request, **groups)
    assert early_refusal.find_early_refusal(request, made, models.skeleton(made), deployment) is None


@pytest.mark.parametrize(
    ("given", "answered"), [("", False), ("--dynamic", False), ("--dynamic --dtype float32", True)]
)
def test_with_dynamic_shapes_a_refusal_that_depends_on_t_needs_the_graph(given: str, answered: bool):
    tokens = 600 if given else 512
    request = parse(f"lower moe --ep 4 --comm mc2 --tokens {tokens} {given}".split())
    made = models.plan_model(request)
    deployment = make_deployment(request, ep_group="ep", mc2_group="mc2")
    found = early_refusal.find_early_refusal(request, made, models.skeleton(made), deployment)
    assert (found is not None) == answered
    if found is not None:
        messages = [v.message for v in found.blocks[0].verdicts["mc2"].violations]
        assert any("tokens is T; accepted: 1 to 512" in message for message in messages)


def test_without_a_provider_the_choice_is_another_one():
    request = parse(["lower", "moe", "--ep", "4", "--provider", "none"])
    assert make_deployment(request, ep_group="ep").providers == ()
    (_, assumed), given = prepare.deployment_facts(request)
    assert given == ("given", "no provider of fused operators installed") and "HCCL_BUFFSIZE is 1024 MB" in assumed
    request = parse(["lower", "moe", "--provider", "cann_ops_transformer=9.1.0"])
    assert make_deployment(request).providers == (("cann_ops_transformer", "9.1.0"),)
    assert make_deployment(LowerRequest("moe")).providers == ASSUMED_PROVIDERS


def test_a_fused_operator_without_a_provider_leaves_the_choice_to_the_graph(capfd: pytest.CaptureFixture[str]):
    """The next best legal implementation, and why it is not the one that was asked for."""
    given = ["qwen3_moe", "--fake", "--layers", "2", "--ep", "16", "--comm", "fused_mc2", "--quant", "w8a8"]
    code, found, err = command(capfd, *given, "--provider", "none")
    assert code == 0, err
    for block in found["blocks"]:
        assert block["comm"] not in (None, "fused_mc2")
        assert block["reason"].startswith(
            "fused_mc2 was asked for, and no provider of its operator is declared [fused.provider]; the simplest of those tied"
        )
        assert "fused.provider" in [v["code"] for v in block["verdicts"]["fused_mc2"]["violations"]]
    torch._dynamo.reset()
    code, found, _ = command(capfd, *given)  # the twin
    assert code == 0 and {block["comm"] for block in found["blocks"]} == {"fused_mc2"}


@pytest.mark.parametrize("more", [(), ("--fake",), ("--capture",), ("--ep", "2")])
def test_experts_that_cannot_be_quantised_are_wrong_usage(more: tuple[str, ...], capfd: pytest.CaptureFixture[str]):
    capfd.readouterr()
    assert cli.main(["lower", "gpt_oss", "--quant", "w8a8", *more]) == 2
    printed = capfd.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err and "building" not in printed.err
    (line,) = [line for line in printed.err.splitlines() if line.startswith("moe-lowering: error: ")]
    assert (
        "argument --quant: is w8a8, and quantise_experts: model.layers.0.mlp.experts has expert biases; accepted"
        in line
    )
