"""The command ``moe-lowering``: arguments, models, the comparison, and whole commands on small models."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_lowering import cli
from moe_lowering.cli import arguments, compare, models, outcome, run
from moe_lowering.cli.arguments import Request, UsageError
from moe_lowering.integrations import transformers as integration
from moe_lowering.passes.choosing import COMMS
from moe_lowering.report.records import BlockReport, LoweringReport, Verdict

KEYS = {
    "model", "blocks", "max_abs_error", "max_rel_error", "snr_db", "nodes_before", "nodes_after", "pass_ms", "captured",
    "not_capturable",
}  # fmt: skip
BLOCK_KEYS = {"name", "comm", "reason", "ops_before", "ops_after", "verdicts", "notes", "enforced", "sizes"}
VIOLATION_KEYS = {"code", "operator", "value", "limit", "source", "message", "advice"}
FAMILIES = ("moe", "mixtral", "qwen3_moe", "deepseek_v3", "olmoe", "gpt_oss", "glm4_moe")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    integration.register()


def command(capfd: pytest.CaptureFixture[str], *given: str) -> tuple[int, dict, str]:
    """(exit code, the JSON object, stderr) of a ``lower`` command run in this process."""
    capfd.readouterr()
    code = cli.main(["lower", *given, "--json"])
    printed = capfd.readouterr()
    return code, json.loads(printed.out), printed.err


# Arguments


def test_the_names_of_implementations_are_those_of_the_pass():
    assert arguments.COMMS == COMMS


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "required: COMMAND"),
        (["lower"], "required: MODEL"),
        (["raise", "moe"], "'raise'"),
        (["lower", "moe", "--comm", "nccl"], "--comm: invalid choice: 'nccl' (choose from 'auto', 'allgather'"),
        (["lower", "moe", "--soc", "A9"], "--soc: invalid choice: 'A9' (choose from 'A2', 'A3'"),
        (["lower", "moe", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["lower", "moe", "--tokens", "0"], "--tokens: is 0; accepted: an integer of 1 or more"),
        (["lower", "moe", "--tokens", "many"], "--tokens: is many; accepted"),
        (["lower", "moe", "--layers", "-1"], "--layers: is -1; accepted"),
        (["lower", "moe", "--fused-mode", "3"], "--fused-mode: invalid choice: 3 (choose from 1, 2)"),
        (["lower", "moe", "--comm", "fusedmc2"], "--comm: invalid choice: 'fusedmc2' (choose from 'auto', 'allgather'"),
        (["lower", "moe", "--quant", "int8"], "--quant: invalid choice: 'int8' (choose from 'none', 'w8a8'"),
        (["lower", "moe", "--tp", "3"], "--tp: is 3 with --ep 1; accepted: a divisor of --ep"),
        (["lower", "moe", "--ep", "4", "--tp", "3"], "--tp: is 3 with --ep 4; accepted: a divisor of --ep"),
        (["lower", "moe", "--provider", "vllm_ascend"], "--provider: is 'vllm_ascend'; accepted: NAME=VERSION"),
        (
            ["lower", "moe", "--provider", "vllm=1.0"],
            "or none; names: vllm_ascend, cann_ops_transformer, sgl_kernel_npu",
        ),
        (
            ["lower", "moe", "--provider", "none", "--provider", "vllm_ascend=1"],
            "--provider: is none and others; accepted",
        ),
        (["lower", "moe", *("--provider", "vllm_ascend=1") * 2], "--provider: vllm_ascend is given twice; accepted"),
        (["lower", "moe", "--ep", "3"], "--ep: is 3, and moe has 16 experts; accepted: a divisor of that"),
        (["lower", "mixtrl"], "MODEL: is 'mixtrl' (did you mean mixtral"),
        (["lower", "llama"], "llama has no MoE layers"),
        (["lower", "no/such/config.json"], "is not a readable config.json"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(given: list[str], says: str, capfd: pytest.CaptureFixture[str]):
    assert cli.main(given) == 2
    printed = capfd.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("moe-lowering: error: ")]
    assert len(errors) == 1 and says in errors[0]
    assert printed.out == "" and "Traceback" not in printed.err


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"model_type": "no_such_type"}', '{"model_type": "mixtral", "num_hidden_layers": "x"}']
)
def test_an_unusable_config_json_is_wrong_usage(text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert cli.main(["lower", str(path), "--fake"]) == 2
    assert str(path) in capfd.readouterr().err


def test_without_transformers_a_model_type_is_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    assert cli.main(["lower", "mixtral"]) == 2
    assert "mixtral needs transformers" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("request_", "batch", "lengths", "max_tokens"),
    [
        (Request("moe"), 2, [16], 32),
        (Request("moe", tokens=7), 1, [7], 7),
        (Request("moe", tokens=1), 1, [1], 1),
        (Request("moe", dynamic=True), 2, [16, 24, 8], 48),
        (Request("moe", tokens=1, dynamic=True), 1, [1, 2], 2),
    ],
)
def test_tokens_are_split_into_sequences(request_: Request, batch: int, lengths: list[int], max_tokens: int):
    assert (request_.batch, request_.lengths, request_.max_tokens) == (batch, lengths, max_tokens)


# Models


@pytest.mark.parametrize("family", FAMILIES)
def test_small_models_have_moe_layers_of_the_one_size_and_no_zero_parameters(family: str):
    made = models.plan(Request(family))
    assert (made.layers, made.experts) == (2, 16)
    model = models.build(made, torch.bfloat16)
    models.randomise(model)
    found = compare.moe_modules(model)
    assert found
    w13 = found[0].w13 if family == "moe" else found[0].gate_up_proj
    assert w13.numel() == 16 * 1024 * 2 * 512
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.any(), name
        assert tensor.isfinite().all() and tensor.abs().max() < 20, name


def test_weights_and_tokens_are_the_same_in_every_process_and_tokens_differ_between_ranks():
    made = models.plan(Request("moe", layers=1))
    pair = [models.build(made, torch.float32) for _ in range(2)]
    for model in pair:
        models.randomise(model)
    for a, b in zip(*(model.state_dict().values() for model in pair), strict=True):
        assert torch.equal(a, b)
    tokens = [models.input_ids(made, Request("moe"), 16, rank) for rank in (0, 0, 1)]
    assert torch.equal(tokens[0], tokens[1]) and not torch.equal(tokens[0], tokens[2])


def test_a_small_number_of_layers_leaves_moe_layers():
    assert models.plan(Request("deepseek_v3", layers=1)).config.first_k_dense_replace == 0
    full = models.plan(Request("deepseek_v3", fake=True)).config
    assert (full.num_hidden_layers, full.first_k_dense_replace, full.n_routed_experts) == (61, 3, 256)


def test_a_config_json_is_taken_as_it_is(tmp_path: Path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mixtral", "hidden_size": 256, "num_local_experts": 4, "num_hidden_layers": 3,
                    "quantization_config": {"quant_method": "fp8"}})
    )  # fmt: skip
    made = models.plan(Request(str(tmp_path), fake=True))
    assert (made.name, made.layers, made.experts, made.config.hidden_size) == ("mixtral", 3, 4, 256)
    with pytest.raises(UsageError, match="--ep: is 8, and mixtral has 4 experts"):
        models.plan(Request(str(tmp_path), ep=8))


def test_weights_that_do_not_fit_are_refused():
    made = models.plan(Request("moe"))
    skeleton = models.skeleton(made)
    size = 2 * sum(p.numel() for p in skeleton.parameters())
    run.require_memory(made, skeleton, Request("moe"), size)
    run.require_memory(made, skeleton, Request("moe"), None)
    for request, available in ((Request("moe"), size - 1), (Request("moe", ep=2), 3 * size)):
        with pytest.raises(UsageError, match="GiB are free; accepted: --fake"):
            run.require_memory(made, skeleton, request, available)


# Comparison


def test_nan_infinity_and_another_shape_are_the_worst_error():
    good = torch.ones(3)
    for bad in (torch.tensor([1.0, float("nan"), 1.0]), torch.tensor([1.0, float("inf"), 1.0]), torch.ones(4)):
        assert compare.difference(bad, good) == (compare.WORST, compare.WORST)
    assert compare.difference(good, good) == (0.0, 0.0)
    assert compare.difference(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0])) == (1.0, 0.25)


@pytest.fixture(scope="module")
def stack() -> models.MoeStack:
    model = models.MoeStack(64, 32, 16, 4, 2, torch.float32).eval().requires_grad_(False)
    models.randomise(model)
    return model


def recorded(model: models.MoeStack, input_ids: torch.Tensor) -> tuple[torch.Tensor, compare.Taken]:
    watched = copy.deepcopy(model)
    taken = compare.record(watched)
    return watched(input_ids), taken


def test_the_generic_operators_agree_with_plain_torch(stack: models.MoeStack):
    input_ids = torch.arange(32).view(2, 16)
    errors = compare.compare(copy.deepcopy(stack), input_ids, *recorded(stack, input_ids))
    assert max(errors.relative, errors.block_relative) < 1e-5
    assert (errors.rerouted, errors.routed) == (0, 64)


def test_an_error_in_one_block_is_seen_at_the_block_even_where_logits_hide_it(stack: models.MoeStack):
    input_ids = torch.arange(32).view(2, 16)
    small = copy.deepcopy(stack)
    for layer in small.layers:
        layer.w2.mul_(1e-4)  # what the experts say drowns in the residual stream
    broken = copy.deepcopy(small)
    broken.layers[1].w13.copy_(broken.layers[1].w13.roll(32, -1))  # gate and up exchanged
    errors = compare.compare(small, input_ids, *recorded(broken, input_ids))
    assert errors.relative < compare.TOLERANCE["bfloat16"] < errors.block_relative


def test_tokens_that_went_to_other_experts_are_replayed_and_counted():
    """The lowered run is one in which three tokens went to other experts in the first layer."""
    made = models.plan(Request("mixtral"))
    reference = models.build(made, torch.float32)
    models.randomise(reference)
    compare.use_reference(reference)
    lowered = copy.deepcopy(reference)
    moved = torch.tensor([3, 4, 20])

    def move(module, arguments):
        x, ids, weights = arguments
        return x, ids.index_copy(0, moved, (ids[moved] + 1) % 16), weights

    compare.moe_modules(lowered)[0].register_forward_pre_hook(move)
    taken = compare.record(lowered)
    input_ids = models.input_ids(made, Request("mixtral"), 16, 0)
    actual = models.logits(lowered, input_ids)
    errors = compare.compare(reference, input_ids, actual, taken)
    assert (errors.rerouted, errors.routed) == (3, 64)
    assert max(errors.relative, errors.block_relative) < 1e-5
    assert compare.difference(actual, models.logits(reference, input_ids))[1] > 0.1  # what it would be otherwise


def test_a_comparison_that_misses_a_block_is_an_error(stack: models.MoeStack):
    input_ids = torch.arange(32).view(2, 16)
    logits, taken = recorded(stack, input_ids)
    with pytest.raises(RuntimeError, match="2 MoE modules, of which 1 ran"):
        compare.compare(copy.deepcopy(stack), input_ids, logits, taken[:1])


# Outcome


def result(errors: compare.Errors | None, comm: str | None = "allgather") -> outcome.Outcome:
    block = BlockReport("layers.0", comm, "mc2 was asked for and is not legal: x", (), (), {"mc2": Verdict("mc2")})
    report = LoweringReport((block,), (), 10, 12, 1.0)
    return outcome.Outcome(Request("moe"), "moe", [report], [], errors, [])


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (result(compare.Errors(0.1, 0.01, 0.01)), ""),
        (result(None), ""),
        (result(compare.Errors(0.1, 0.04, 0.01)), "outputs differ: max_rel_error 0.04"),
        (result(compare.Errors(0.1, 0.01, 0.04)), "outputs differ: max_rel_error 0.04"),
        (result(compare.Errors(0.1, 0.01, 0.01, 30, 100)), "30 of 100 tokens went to other experts"),
        (result(None, comm=None), "layers.0 not lowered: mc2 was asked for"),
    ],
)
def test_problems(found: outcome.Outcome, says: str):
    assert (says in found.problems()[0]) if says else not found.problems()


def test_no_block_is_a_problem_and_text_and_json_can_be_made_of_anything():
    empty = outcome.Outcome(Request("moe"), "moe", [], [("experts", "a reason")], None, [])
    assert empty.problems() == ["experts is not lowered: a reason"]
    assert outcome.Outcome(Request("moe"), "moe", [], [], None, []).problems() == [
        "no MoE block was found in the graph"
    ]
    assert json.loads(empty.to_json())["pass_ms"] is None and "a reason" in empty.to_text()
    worst = result(compare.Errors(compare.WORST, compare.WORST, compare.WORST))
    assert json.loads(worst.to_json())["max_rel_error"] == compare.WORST


# Whole commands


@pytest.mark.parametrize(
    "given",
    [
        ("moe", "--dynamic", "--tokens", "16"),
        ("moe", "--tokens", "1"),
        ("deepseek_v3", "--dtype", "float32", "--tokens", "8"),
        ("gpt_oss", "--layers", "1", "--tokens", "8"),
    ],
    ids=" ".join,
)
def test_a_model_is_lowered_and_agrees(given: tuple[str, ...], capfd: pytest.CaptureFixture[str]):
    code, found, _ = command(capfd, *given)
    assert code == 0
    assert set(found) == KEYS and found["model"] == given[0] and found["captured"] is None
    assert found["blocks"] and found["nodes_before"] > 0 and found["nodes_after"] > 0 and found["pass_ms"] > 0
    assert 0 <= found["max_rel_error"] < compare.TOLERANCE["bfloat16"]
    for block in found["blocks"]:
        assert set(block) == BLOCK_KEYS and block["comm"] == "allgather"
        assert block["ops_before"][0] == "moe_lowering.dispatch"
        assert "npu.npu_grouped_matmul" in block["ops_after"]
        assert block["verdicts"]["allgather"] == {"legal": True, "form": "allgather", "violations": []}
        assert set(block["verdicts"]["mc2"]["violations"][0]) == VIOLATION_KEYS
        assert block["sizes"]["received"]["value"] and block["sizes"]["windows"] == []


def test_a_broken_lowering_is_a_mismatch(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Gate and up are taken as halves where gpt-oss interleaves them."""
    right = integration._form
    wrong = torch.compiler.assume_constant_result(lambda module: right(module)._replace(interleaved=False))
    monkeypatch.setattr(integration, "_form", wrong)
    code, found, err = command(capfd, "gpt_oss", "--layers", "1", "--tokens", "8")
    assert code == 1 and "outputs differ" in err
    assert found["blocks"][0]["comm"] == "allgather" and found["max_rel_error"] > 0.1


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
    assert block["comm"] is None and codes == ["mc2.communicator", "mc2.ep_size", "mc2.ep_size"]
    assert all(code in err for code in codes)
    assert early["nodes_before"] is early["pass_ms"] is early["max_rel_error"] is None

    monkeypatch.setattr(run.beforehand, "refused", lambda *_: None)
    code, late, err = command(capfd, *given)
    assert code == 1 and "building" in err
    assert late["blocks"][0]["verdicts"] == block["verdicts"] and late["blocks"][0]["reason"] == block["reason"]
    assert late["max_rel_error"] < compare.TOLERANCE["bfloat16"]  # left as it was, it still computes the same


@pytest.mark.parametrize(
    ("given", "codes"),
    [
        (
            "qwen3_moe --ep 4 --comm fused_mc2 --quant w4a16",
            {"fused.quantisation", "fused.offset", "fused.compensation"},
        ),
        ("qwen3_moe --ep 4 --comm fused_mc2 --quant w8a8 --provider none", {"fused.provider"}),
        ("gpt_oss --ep 2 --comm fused_mc2", {"fused.activation", "fused.gate_order", "fused.bias"}),
        ("qwen3_moe --comm mc2", {"mc2.communicator", "mc2.ep_size"}),
        ("moe --ep 4 --comm mc2 --tokens 600 --dynamic --dtype float32", {"mc2.x_dtype", "mc2.tokens"}),
    ],
)
def test_codes_from_the_options_are_those_of_the_graph(
    given: str, codes: set[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """A graph that is traced with fake tensors has the same verdicts; T is a symbol with --dynamic."""
    arguments_ = ("--fake", "--layers", "2", *given.split())
    found = []
    for answer in (run.beforehand.refused, lambda *_: None):
        monkeypatch.setattr(run.beforehand, "refused", answer)
        torch._dynamo.reset()
        code, report, _ = command(capfd, *arguments_)
        assert code == 1
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
    request = arguments.parse(["lower", *given.split()])
    made = models.plan(request)
    groups = {"ep_group": "ep", "mc2_group": "mc2"} if request.ep > 1 else {}
    deployment = run.deployment_for(request, **groups)
    assert run.beforehand.refused(request, made, models.skeleton(made), deployment) is None


@pytest.mark.parametrize(
    ("given", "answered"), [("", False), ("--dynamic", False), ("--dynamic --dtype float32", True)]
)
def test_with_dynamic_shapes_a_refusal_that_depends_on_t_needs_the_graph(given: str, answered: bool):
    tokens = 600 if given else 512
    request = arguments.parse(f"lower moe --ep 4 --comm mc2 --tokens {tokens} {given}".split())
    made = models.plan(request)
    deployment = run.deployment_for(request, ep_group="ep", mc2_group="mc2")
    found = run.beforehand.refused(request, made, models.skeleton(made), deployment)
    assert (found is not None) == answered
    if found is not None:
        messages = [v.message for v in found.blocks[0].verdicts["mc2"].violations]
        assert any("tokens is T; accepted: 1 to 512" in message for message in messages)


def test_without_a_provider_the_choice_is_another_one():
    request = arguments.parse(["lower", "moe", "--ep", "4", "--provider", "none"])
    assert run.deployment_for(request, ep_group="ep").providers == ()
    assert "no provider of fused operators installed" in run.assumptions(request)
    request = arguments.parse(["lower", "moe", "--provider", "cann_ops_transformer=9.1.0"])
    assert run.deployment_for(request).providers == (("cann_ops_transformer", "9.1.0"),)
    assert run.deployment_for(Request("moe")).providers == arguments.PROVIDERS


def test_experts_that_are_not_supported_are_named(capfd: pytest.CaptureFixture[str]):
    code, found, err = command(capfd, "nemotron_h", "--ep", "2")
    assert code == 1 and found["blocks"] == [] and found["max_abs_error"] is None
    assert "mixer.experts is not lowered: it has no gate projection" in err


def test_ranks_that_choose_differently_are_an_error():
    reports = [
        [LoweringReport((BlockReport("a", comm, "", (), (), {}),), (), 1, 1, 1.0)] for comm in ("mc2", "allgather")
    ]
    run.require_same_choices([reports[0], reports[0]])
    with pytest.raises(RuntimeError, match="rank 1 lowered to"):
        run.require_same_choices(reports)


@pytest.mark.parametrize("ep", [16, 64])
def test_a_full_size_model_is_lowered_without_weights(ep: int, capfd: pytest.CaptureFixture[str]):
    code, found, _ = command(
        capfd, "deepseek_v3", "--fake", "--layers", "4", "--ep", str(ep), "--tokens", "64"
    )  # fmt: skip
    assert code == 0
    (block,) = found["blocks"]
    assert block["name"] == "model.layers.3.mlp.experts"
    assert block["comm"] == {16: "fused_mc2", 64: "mc2"}[ep]
    assert found["max_abs_error"] is None and found["max_rel_error"] is None
    assert found["nodes_after"] > 0


def test_the_installed_command_needs_no_environment(tmp_path: Path):
    """One JSON object on stdout, nothing else, from a process in which nothing was prepared."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-m", "moe_lowering", "lower", "moe", "--json", "--layers", "1", "--tokens", "4"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == KEYS
    assert "compiling and running" in done.stderr


def test_the_report_is_text_by_default(capfd: pytest.CaptureFixture[str]):
    capfd.readouterr()
    assert cli.main(["lower", "moe", "--layers", "1", "--tokens", "8"]) == 0
    text = capfd.readouterr().out
    for part in ("assumed", "implementation    allgather", "max rel error", "not mc2"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 100
