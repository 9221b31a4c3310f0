"""The command ``moe-lowering``: arguments, models, the comparison, and whole commands on small models."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_commands import command, fresh_dynamo  # noqa: F401

import moe_lowering
from moe_lowering import cli
from moe_lowering.cli.lower import compare, failures, models, outcome, run
from moe_lowering.cli.lower.request import LowerRequest
from moe_lowering.cli.usage import UsageError
from moe_lowering.integrations import transformers as integration
from moe_lowering.model_configs.presets import PRESETS
from moe_lowering.report.records import BlockReport, LoweringReport, Verdict
from moe_lowering.testing.ranks import RankError

KEYS = {
    "schema_version",
    "model", "blocks", "max_abs_error", "max_rel_error", "snr_db", "nodes_before", "nodes_after", "pass_ms", "captured",
    "not_capturable",
    "deployment", "detected",
    "foreign",
}  # fmt: skip
BLOCK_KEYS = {
    "name", "comm", "reason", "ops_before", "ops_after", "verdicts", "notes", "enforced", "sizes", "costs", "raised_from",
}  # fmt: skip
VIOLATION_KEYS = {
    "code", "operator", "quantity", "value", "limit", "accepted", "source", "sources", "message", "advice",
}  # fmt: skip
FAMILIES = ("moe", "mixtral", "qwen3_moe", "deepseek_v3", "olmoe", "gpt_oss", "glm4_moe")


# Arguments


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            ["lower"],
            "argument MODEL: is missing; accepted: moe, a published model, a transformers model type, or a path to a config.json",
        ),
        (["raise", "moe"], "'raise'"),
        (["lower", "moe", "--comm", "nccl"], "--comm: is 'nccl'; accepted: auto, allgather, "),
        (["lowr", "moe"], "is 'lowr' (did you mean lower?); accepted: lower, explain, "),
        (["lower", "moe", "--soc", "A9"], "--soc: is 'A9'; accepted: A2 (910B), A3 (910C,"),
        (["lower", "moe", "--dtype", "int8"], "--dtype: is 'int8'; accepted: float32, "),
        (["lower", "moe", "--tokens", "0"], "--tokens: is '0'; accepted: an integer from 1 to"),
        (["lower", "moe", "--tokens", "many"], "--tokens: is 'many'; accepted"),
        (["lower", "moe", "--layers", "-1"], "--layers: is '-1'; accepted"),
        (["lower", "moe", "--fused-mode", "3"], "--fused-mode: is 3; accepted: 0, 1, 2"),
        (["lower", "moe", "--comm", "fusedmc2"], "--comm: is 'fusedmc2'; accepted: auto, allgather, "),
        (["lower", "moe", "--quant", "int8"], "--quant: is 'int8'; accepted: none, w8a8, "),
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
        (
            ["lower", "moe", "--ep", "3"],
            "--ep: is 3, and the small moe that runs without --fake has 16 experts; accepted: a divisor of that",
        ),
        (["lower", "mixtrl"], "MODEL: is 'mixtrl' (did you mean mixtral"),
        (["lower", "Qwen3-235B-A22B"], "MODEL: is 'Qwen3-235B-A22B' (did you mean qwen3_235b?)"),
        (["lower", "moe", "--tp", "1,2"], "argument --tp: is '1,2'; accepted: one integer"),
        (["lower", "llama"], "llama has no MoE layers (did you mean llama4?)"),
        (["lower", "qwen3"], "qwen3 has no MoE layers (did you mean qwen3_moe, qwen3_5_moe, qwen3_vl_moe?)"),
        (["lower", "moe", "--ep"], "argument --ep: is given without a value; accepted: --ep N (ranks"),
        (
            ["lower", "moe", "--dtype"],
            "--dtype: is given without a value; accepted: --dtype {float32,float16,bfloat16} (of",
        ),
        (["lower", "moe", "--quant", "W8A9"], "--quant: is 'W8A9'; accepted: none, w8a8"),
        (["lower", "moe", "--hidden-size", "8"], "argument --hidden-size: is no option of lower; accepted: those of"),
        (["lower", "moe", "--buffer-mb", "65536"], "--buffer-mb: is '65536'; accepted: an integer from 1 to 65535"),
        (["lower", "moe", "--", "--ep", "4"], "argument --ep: stands behind --, where no options are read; accepted"),
        (["--nope"], "argument --nope: stands before COMMAND; accepted"),
        (["explain", "qwen3"], "MODEL: qwen3 has no MoE layers (did you mean qwen3_moe, qwen3_5_moe, qwen3_vl_moe?)"),
        (
            ["explain", "bert", "--experts", "8"],
            "argument MODEL: bert has no MoE layers; accepted: moe, a published model",
        ),
        (["lower", "gpt2"], "gpt2 has no MoE layers; accepted"),
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
        (LowerRequest("moe"), 2, [16], 32),
        (LowerRequest("moe", tokens=7), 1, [7], 7),
        (LowerRequest("moe", tokens=1), 1, [1], 1),
        (LowerRequest("moe", dynamic=True), 2, [16, 24, 8], 48),
        (LowerRequest("moe", tokens=1, dynamic=True), 1, [1, 2], 2),
    ],
)
def test_tokens_are_split_into_sequences(request_: LowerRequest, batch: int, lengths: list[int], max_tokens: int):
    assert (request_.batch, request_.lengths, request_.max_tokens) == (batch, lengths, max_tokens)


# Models


@pytest.mark.parametrize("family", FAMILIES)
def test_small_models_have_moe_layers_of_the_one_size_and_no_zero_parameters(family: str):
    made = models.plan_model(LowerRequest(family))
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
    made = models.plan_model(LowerRequest("moe", layers=1))
    pair = [models.build(made, torch.float32) for _ in range(2)]
    for model in pair:
        models.randomise(model)
    for a, b in zip(*(model.state_dict().values() for model in pair), strict=True):
        assert torch.equal(a, b)
    tokens = [models.input_ids(made, LowerRequest("moe"), 16, rank) for rank in (0, 0, 1)]
    assert torch.equal(tokens[0], tokens[1]) and not torch.equal(tokens[0], tokens[2])


def test_a_small_number_of_layers_leaves_moe_layers():
    assert models.plan_model(LowerRequest("deepseek_v3", layers=1)).config.first_k_dense_replace == 0
    full = models.plan_model(LowerRequest("deepseek_v3", fake=True)).config
    assert (full.num_hidden_layers, full.first_k_dense_replace, full.n_routed_experts) == (61, 3, 256)


def test_a_config_json_is_taken_as_it_is(tmp_path: Path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mixtral", "hidden_size": 256, "num_local_experts": 4, "num_hidden_layers": 3,
                    "quantization_config": {"quant_method": "fp8"}})
    )  # fmt: skip
    made = models.plan_model(LowerRequest(str(tmp_path), fake=True))
    assert (made.name, made.layers, made.experts, made.config.hidden_size) == ("mixtral", 3, 4, 256)
    with pytest.raises(UsageError, match="--ep: is 8, and mixtral has 4 experts"):
        models.plan_model(LowerRequest(str(tmp_path), ep=8))


def test_weights_that_do_not_fit_are_refused():
    made = models.plan_model(LowerRequest("moe"))
    skeleton = models.skeleton(made)
    size = 2 * sum(p.numel() for p in skeleton.parameters())
    run.require_memory(made, skeleton, LowerRequest("moe"), size)
    run.require_memory(made, skeleton, LowerRequest("moe"), None)
    for request, available in ((LowerRequest("moe"), size - 1), (LowerRequest("moe", ep=2), 3 * size)):
        with pytest.raises(UsageError, match="GB are free; accepted: --fake"):
            run.require_memory(made, skeleton, request, available)


# Outcome


def result(errors: compare.Errors | None, comm: str | None = "allgather") -> outcome.LowerOutcome:
    block = BlockReport("layers.0", comm, "mc2 was asked for and is not legal: x", (), (), {"mc2": Verdict("mc2")})
    report = LoweringReport((block,), (), 10, 12, 1.0)
    return outcome.LowerOutcome(LowerRequest("moe"), "moe", [report], [], errors, [])


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
def test_problems(found: outcome.LowerOutcome, says: str):
    assert (says in found.problems()[0]) if says else not found.problems()


def test_no_block_is_a_problem_and_text_and_json_can_be_made_of_anything():
    empty = outcome.LowerOutcome(LowerRequest("moe"), "moe", [], [("experts", "a reason")], None, [])
    assert empty.problems() == ["experts is not lowered: a reason"]
    assert outcome.LowerOutcome(LowerRequest("moe"), "moe", [], [], None, []).problems() == [
        "no MoE block was found in the graph"
    ]
    assert json.loads(empty.to_json())["pass_ms"] is None and "a reason" in empty.to_text()
    tied = " ".join(result(compare.Errors(0.1, 0.01, 0.01, 3, 64)).to_text().split())
    assert "3 of 64 tokens went to other experts (those of all ranks, each once per MoE layer)" in tied
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
    code, found, err = command(capfd, *given)
    assert code == 0
    assert (f"a small {given[0]} on 1 process; --fake lowers the published size" in err) == (given[0] in PRESETS)
    assert set(found) == KEYS and found["model"] == given[0] and found["captured"] is None
    assert found["blocks"] and found["nodes_before"] > 0 and found["nodes_after"] > 0 and found["pass_ms"] > 0
    assert 0 <= found["max_rel_error"] < compare.TOLERANCE["bfloat16"]
    for block in found["blocks"]:
        assert set(block) == BLOCK_KEYS and block["comm"] == "allgather"
        assert block["ops_before"][0] == "moe_lowering.dispatch"
        assert "npu.npu_grouped_matmul" in block["ops_after"]
        assert block["verdicts"]["allgather"] == {"legal": True, "form": "allgather", "violations": []}
        assert set(block["verdicts"]["mc2"]["violations"][0]) - {"buffer"} == VIOLATION_KEYS
        assert block["sizes"]["received"]["value"] and block["sizes"]["windows"] == []


def test_a_broken_lowering_is_a_mismatch(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Gate and up are taken as halves where gpt-oss interleaves them."""
    right = integration._read_form
    wrong = torch.compiler.assume_constant_result(lambda module: right(module)._replace(interleaved=False))
    monkeypatch.setattr(integration, "_read_form", wrong)
    code, found, err = command(capfd, "gpt_oss", "--layers", "1", "--tokens", "8")
    assert code == 1 and "outputs differ" in err
    assert found["blocks"][0]["comm"] == "allgather" and found["max_rel_error"] > 0.1


def test_experts_that_are_not_supported_are_named(capfd: pytest.CaptureFixture[str]):
    code, found, err = command(capfd, "nllb-moe", "--ep", "2")
    assert code == 1 and found["blocks"] == [] and found["max_abs_error"] is None
    assert "ffn.experts is not lowered: [experts.own_code] it takes the router" in err


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
    assert "compiling and running" not in done.stderr, "what it is doing is said on a terminal only"


def test_the_report_is_text_by_default(capfd: pytest.CaptureFixture[str]):
    capfd.readouterr()
    assert cli.main(["lower", "moe", "--layers", "1", "--tokens", "8"]) == 0
    text = capfd.readouterr().out
    for part in ("assumed", "implementation    allgather", "max rel error", "not mc2"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 100


# Failures


def failure_in(*folders: str) -> Exception:
    """An error whose stack goes through files of these folders, the last of which raises it."""
    calls: dict[str, Any] = {"inner": None}
    for folder in reversed(folders):
        source = (
            "def call(inner):\n    if inner is None:\n        raise TypeError('a ValuePack is no int')\n    inner()"
        )
        own: dict[str, Any] = {}
        exec(compile(source, f"{folder}/x.py", "exec"), own)
        calls["inner"] = functools.partial(own["call"], calls["inner"])
    with pytest.raises(TypeError) as raised:
        calls["inner"]()
    # without this frame: a command's own are of this package
    return raised.value.with_traceback(raised.value.__traceback__ and raised.value.__traceback__.tb_next)


SITE, OURS = "/usr/site-packages", str(Path(moe_lowering.__file__).parent)
OWNERS = [
    ((f"{SITE}/torch/_dynamo", f"{SITE}/torch_npu/dynamo/npugraph_ex", f"{SITE}/torch/fx"), failures.NPUGRAPH_EX),
    ((f"{SITE}/torch/_dynamo", f"{SITE}/torch_npu/dynamo/npugraph_ex", f"{OURS}/passes"), failures.OWN),
    ((f"{OURS}/cli/lower", f"{SITE}/torch/_dynamo"), failures.TORCH),
    ((f"{OURS}/cli/lower", f"{SITE}/transformers"), failures.MODEL),
    (
        (f"{OURS}/cli/lower", f"{SITE}/torch/nn", f"{SITE}/transformers"),
        failures.MODEL,
    ),  # every module is called by torch
    (
        (f"{SITE}/torch/nn", f"{SITE}/transformers", f"{SITE}/torch/nn"),
        failures.MODEL,
    ),  # and calls it with what is wrong
]


@pytest.mark.parametrize(("folders", "owner"), OWNERS)
def test_a_failure_is_that_of_whose_code_raised_it(folders, owner):
    error = failure_in(*folders)
    assert failures.owner_of(error) == owner
    wrapped = RuntimeError("backend='npugraph_ex' raised:\nTypeError: a ValuePack is no int")
    wrapped.inner_exception = error  # type: ignore[attr-defined]  # as torch's BackendCompilerFailed has it
    assert failures.owner_of(wrapped) == owner
    text = str(failures.run_error(wrapped, LowerRequest("jetmoe")))
    assert "TypeError: a ValuePack is no int" in text and "backend=" not in text and "\n" not in text
    assert ("not of the lowering" in text) == ("sizes that come from data" in text) == (owner != failures.OWN)
    trace = "".join(f'  File "{folder}/x.py", line 3, in call\n' for folder in (f"{OURS}/testing", *folders))
    assert failures.owner_of(RankError(f"rank 1: TypeError: no\n{trace}")) == owner


@pytest.mark.parametrize("verbose", [False, True])
def test_a_failure_is_one_line_and_has_a_traceback_on_request(monkeypatch, capfd, verbose):
    error = failure_in(f"{SITE}/torch_npu/dynamo/npugraph_ex")
    monkeypatch.setattr(run, "lower_and_compare", lambda request, progress: (_ for _ in ()).throw(error))
    assert cli.main(["lower", "moe", *(["--verbose"] if verbose else [])]) == 1
    out, err = capfd.readouterr()
    assert out == "" and ("Traceback" in err) == verbose == (err.count("\n") > 1)
    assert re.match(
        "moe-lowering: error: moe cannot be run, by an error of torch_npu's npugraph_ex, not of the lowering: TypeError: "
        "a ValuePack is no int; sizes .*docs/models.md.* moe-lowering explain moe; --verbose prints", err.splitlines()[-1]
    )  # fmt: skip
