"""Families of transformers: the list, a small model of each, what is tried of one, processes, records, the command's usage."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from json_schema import problems

from moe_lowering import cli
from moe_lowering.cli.lower.configs import SMALL
from moe_lowering.families import attempts, listing, runner, table
from moe_lowering.families.records import (
    DTYPES,
    FAILED,
    LEFT,
    RIGHT,
    SHAPES,
    WAYS,
    WRONG,
    Attempt,
    Row,
    failed,
    read_rows,
    to_json,
)  # fmt: skip
from moe_lowering.families.small_models import TINY, build, randomise
from moe_lowering.integrations import replacements
from moe_lowering.integrations.replaced_experts import REFUSED
from moe_lowering.integrations.transformers import capabilities, register
from moe_lowering.layers.expert_modules import is_experts_module
from moe_lowering.model_configs.errors import ModelError
from moe_lowering.model_configs.read import read_text_config
from moe_lowering.model_configs.small import shrink, with_layers
from moe_lowering.number_words import WORST
from moe_lowering.report.schemas import schema

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
# No gate; an expert's output is normalised. Modules of each kind: test_expert_forms
KINDS = (
    "nemotron_h",
    "muse_spark",
)
STATIC = [("hook", "float32", "static")]
NOT_LOWERED = {"nllb_moe", "jetmoe"}


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()


# --- the list, and a small model of each -----------------------------------------------------------------------------


def test_the_list_has_what_is_known_of_transformers():
    found = listing.families()
    assert len(found) == len(set(found)) >= 60
    assert {"qwen3_moe", "llama4", "dbrx", "switch_transformers", *NOT_LOWERED, *KINDS} <= set(found)
    assert not {"llama", "bert"} & set(found)


@pytest.mark.parametrize("family", listing.families())
def test_every_family_has_a_small_model_that_is_lowered_or_a_reason(family: str):
    """As ``moe-lowering lower FAMILY`` makes it, on device meta."""
    config = shrink(read_text_config(listing.model_type(family)), SMALL, 2)
    with torch.device("meta"):
        model = build(config, torch.bfloat16)
    found = capabilities(model)
    assert found
    left = [reason for _, supported, reason in found if not supported]
    assert all(reason.startswith("[experts.") for reason in left)
    assert bool(left) == (family in NOT_LOWERED)
    sizes = [p.numel() for p in model.parameters()]
    assert sum(sizes) < 5e8, "small enough for a laptop"
    for module in (each for each in model.modules() if is_experts_module(each)):
        assert module.num_experts == SMALL.experts


@pytest.mark.parametrize("layers", [1, 3])
def test_layers_that_are_left_have_experts(layers: int):
    config = with_layers(read_text_config("deepseek_v32"), layers)
    assert (config.num_hidden_layers, config.mlp_layer_types) == (layers, ["sparse"] * layers)


def test_a_config_that_its_class_refuses_is_an_error_with_its_name():
    with pytest.raises(ModelError, match="qwen3_moe cannot be resized: "):
        shrink(read_text_config("qwen3_moe"), SMALL.__class__(**{**SMALL.__dict__, "hidden": "wide"}), 2)


# --- what is tried ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KINDS)
def test_a_family_of_each_kind_is_lowered_with_the_models_own_result(family: str):
    (attempt,) = attempts.attempt_family(family, STATIC).attempts
    assert (attempt.state, attempt.reason) == (RIGHT, "")
    assert attempt.lowered == attempt.layers > 0 and attempt.comms == ("allgather",)
    assert attempt.error is not None and attempt.error < 1e-5


def test_a_wrong_result_is_seen(monkeypatch: pytest.MonkeyPatch):
    """The twin: a replacement that does not weigh the tokens."""

    def forward(self, hidden_states):
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        _, logits = self.router(hidden_states)
        ids = logits.topk(1, dim=-1).indices
        routed = self.experts(hidden_states, ids, torch.ones_like(ids, dtype=hidden_states.dtype))
        return self.shared_expert(hidden_states) + routed, logits

    monkeypatch.setattr(replacements._Llama4, "forward", forward)
    (attempt,) = attempts.attempt_family("llama4", STATIC).attempts
    assert attempt.state == WRONG and attempt.reason.startswith("[models.wrong] error ")


def test_what_is_refused_and_what_cannot_be_built_have_their_reasons(monkeypatch: pytest.MonkeyPatch):
    (attempt,) = attempts.attempt_family("nllb_moe", STATIC).attempts
    assert (attempt.state, attempt.reason) == (LEFT, REFUSED["NllbMoeExperts"][: attempts._REASON])

    def build(*arguments):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(attempts, "build", build)
    (attempt,) = attempts.attempt_family("mixtral", STATIC).attempts
    assert (attempt.state, attempt.reason) == (FAILED, "[models.failed] RuntimeError: no such thing")


def test_a_graph_with_dynamic_shapes_runs_with_all_lengths(monkeypatch: pytest.MonkeyPatch):
    """One graph for both: what records the calls of the layers makes dynamo compile none anew."""
    judge, graphs = attempts._judged, []

    def judged(kind, reports, *more):
        graphs.append(len(reports))
        return judge(kind, reports, *more)

    monkeypatch.setattr(attempts, "_judged", judged)
    (attempt,) = attempts.attempt_family("mixtral", [("trace", "float32", "dynamic")]).attempts
    assert (attempt.state, attempt.layers, graphs) == (RIGHT, 1, [1])


def test_a_model_that_is_no_graph_is_left_with_its_line():
    """A loop over the experts that have tokens; what its parts hold is said as well."""
    (attempt,) = attempts.attempt_family("dbrx", [("trace", "bfloat16", "static")]).attempts
    assert (attempt.state, attempt.lowered) == (LEFT, 0)
    assert attempt.reason.startswith("[models.no_graph] ") and "for expert_idx in expert_hit:" in attempt.reason
    assert "modeling_dbrx.py:" in attempt.reason and "[foreign.routing_alone]" in attempt.reason


@pytest.mark.parametrize(("error", "of_model", "state"), [(1e-7, 0.0, LEFT), (1e-2, 0.0, WRONG), (1e-7, 1.0, WRONG)])
def test_a_layer_that_is_left_is_compared_too(error: float, of_model: float, state: str):
    attempt = attempts._judged(STATIC[0], [], 1, error, of_model, "[experts.other] of another kind")
    assert attempt.state == state and attempt.reason.startswith(
        "[experts.other]" if state == LEFT else "[models.wrong]"
    )


@pytest.mark.parametrize(
    ("actual", "accepted"), [([1.0, 2.0], True), ([1.0, 2.1], False), ([1.0, float("nan")], False), ([1.0], False)]
)
def test_differences(actual: list[float], accepted: bool):
    assert (attempts.difference(torch.tensor(actual), torch.tensor([1.0, 2.0])) < 1e-6) == accepted


def test_an_expected_output_of_zeros_is_no_comparison():
    assert attempts.difference(torch.zeros(2), torch.zeros(2)) == float("inf")


@pytest.mark.parametrize("family", ["mixtral", "dbrx"])
def test_weights_are_drawn_and_no_parameter_stays_zero(family: str):
    model = build(shrink(read_text_config(family), TINY, 1), torch.float32)
    randomise(model)
    assert all(bool(p.any()) and bool(p.isfinite().all()) for p in model.parameters())


# --- processes -------------------------------------------------------------------------------------------------------


def attempt_or_die(family: str, kinds) -> Row:
    if family == "crash":
        os._exit(3)
    if family == "hang":
        time.sleep(60)
    if family == "raise":
        raise RuntimeError("of the family")
    return Row(family, tuple(Attempt(*kind, RIGHT, 1, 1) for kind in kinds))


def test_what_ends_a_process_is_one_row():
    rows: list[Row] = []
    lines: list[str] = []
    expected = [(family, STATIC) for family in ("crash", "good", "hang", "raise")]
    runner.run_families(expected, rows.append, lines.append, attempt_or_die, timeout=2.0)
    states = {row.family: row.attempts[0] for row in rows}
    assert states["good"].state == RIGHT
    assert states["crash"].reason == "[models.crashed] its process ended with exit code 3"
    assert states["raise"].reason == "[models.crashed] its process ended with exit code 1"
    assert states["hang"].reason == "[models.timeout] it was not done after 2 s"
    assert [line.split(":")[0] for line in lines] == [f"{n} of 4" for n in (1, 2, 3, 4) for _ in range(2)]
    attempts = f"{len(STATIC)} attempt{'s' * (len(STATIC) > 1)}"
    assert lines[0] == f"1 of 4: crash: {attempts}" and lines[2] == f"2 of 4: good: {attempts}", (
        "told before it is tried"
    )


# --- records ---------------------------------------------------------------------------------------------------------


def test_rows_are_read_as_they_were_written(tmp_path: Path):
    rows = [
        Row("a", (Attempt("hook", "float32", "static", RIGHT, 2, 2, ("mc2",), 1e-7, 1, 0),), 1.5),
        Row("b", (Attempt("hook", "float32", "static", WRONG, 2, 2, error=float("inf"), reason="[x] y"),)),
        failed("c", STATIC, "[x] y"),
    ]
    (tmp_path / "rows.json").write_text(to_json(rows, "5"))
    assert read_rows(tmp_path / "rows.json", "5") == rows
    assert read_rows(tmp_path / "none.json", "5") == []


def test_the_file_is_as_its_schema_says():
    """And is JSON, where an error is infinite."""
    wrong = Attempt("trace", "bfloat16", "dynamic", WRONG, 2, 2, error=float("inf"), reason="[x] y")
    written = json.loads(to_json([Row("a", (wrong,))], "5"), parse_constant=pytest.fail)
    assert written["families"][0]["attempts"][0]["error"] == WORST
    assert not problems(written, schema("models"))
    assert problems({**written, "families": [{}]}, schema("models"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be resumed"),
        ("[]", "cannot be resumed"),
        (json.dumps({"format": 0, "transformers": "5", "families": []}), "its format is 0, not 1"),
        (json.dumps({"format": 1, "transformers": "4", "families": []}), "of transformers '4', and 5 is installed"),
        (json.dumps({"format": 1, "transformers": "5", "families": [{"family": "a"}]}), "KeyError"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        read_rows(tmp_path / "rows.json", "5")


@pytest.mark.parametrize("change", [{"way": "magic"}, {"state": "fine"}, {"reason": "why"}, {"state": LEFT}])
def test_an_attempt_of_other_words_is_no_record(change: dict[str, str]):
    with pytest.raises(ValueError, match=r"Attempt: .*accepted: "):
        Attempt(**{"way": "hook", "dtype": "float32", "shapes": "static", "state": RIGHT, **change})


def test_new_attempts_come_instead_of_old_ones_and_beside_others():
    old = Row("a", tuple(Attempt(*kind, LEFT, reason="[x] y") for kind in (("trace", "float32", "static"), *STATIC)))
    both = old.with_attempts(Row("a", (Attempt(*STATIC[0], RIGHT),)))
    assert [(attempt.way, attempt.state) for attempt in both.attempts] == [("hook", RIGHT), ("trace", LEFT)]
    assert both.is_right("hook") and not both.is_right("trace") and not Row("b", ()).is_right("hook")


# --- the command -----------------------------------------------------------------------------------------------------


def command(capfd: pytest.CaptureFixture[str], *given: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a ``models`` command run in this process."""
    capfd.readouterr()
    code = cli.main(["models", *given])
    return (code, *capfd.readouterr())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "qwen3moe"], "qwen2_moe?); accepted: the "),
        (["--only", "llama"], "--only: has 'llama'"),
        (["--only", ""], "names of families, with commas"),
        (["--ways", "hok"], "did you mean hook"),
        (["--dtypes", "bf16"], "accepted: of bfloat16,float32"),
        (["--shapes", "static,dinamic"], "did you mean dynamic"),
        (["--again"], "--again: is given without --resume"),
        (["--json", "/nowhere/at/all.json"], "--json: is /nowhere/at/all.json; accepted: a file in a folder"),
    ],
)  # fmt: skip
def test_wrong_usage(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]):
    code, out, err = command(capfd, *arguments)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_a_command_resumes_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    tried = []

    def run(expected, done, progress):
        for family, kinds in expected:
            tried.append((family, len(kinds)))
            done(attempt_or_die(family, kinds))

    monkeypatch.setattr("moe_lowering.cli.models.command.run_families", run)
    file, page, rows = tmp_path / "state.json", tmp_path / "page.md", tmp_path / "rows.json"
    code, _, _ = command(capfd, "--only", "mixtral", "--ways", "hook", "--shapes", "static", "--resume", str(file))
    assert code == 0 and tried == [("mixtral", 2)]
    files = ["--resume", str(file), "--write", str(page), "--json", str(rows)]
    code, out, _ = command(capfd, "--only", "mixtral,dbrx", *files)
    assert tried[1:] == [("mixtral", 6), ("dbrx", 8)] and code == 0
    assert out.count(" yes") == 16 and "by hook 2 of 2 lowered and right; by trace 2 of 2" in out
    assert rows.read_text() == file.read_text() and len(table_rows(page)) == 2
    assert sorted(each.name for each in tmp_path.iterdir()) == ["page.md", "rows.json", "state.json"]


def test_a_wrong_layer_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    wrong = Row("mixtral", (Attempt(*STATIC[0], WRONG, reason="[models.wrong] error 1"),))
    monkeypatch.setattr("moe_lowering.cli.models.command.run_families", lambda expected, done, progress: done(wrong))
    code, out, err = command(capfd, "--only", "mixtral")
    assert "that a shared expert runs beside, 0 also where there is none" in " ".join(out.split())
    assert code == 1 and "WRONG" in out and "mixtral: hook float32 static: [models.wrong]" in err


# --- the page --------------------------------------------------------------------------------------------------------


def table_rows(page: Path) -> dict[str, list[str]]:
    lines = [line for line in page.read_text().splitlines() if line.startswith("| ")][1:]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}


def test_the_page_has_every_family_and_its_rows_are_whole():
    rows = table_rows(PAGE)
    assert tuple(rows) == listing.families()
    assert f"transformers {listing.transformers_version()}" in PAGE.read_text()
    kinds = len(WAYS) * len(DTYPES) * len(SHAPES)
    reasons = PAGE.read_text().split("## Not lowered, and why")[1]
    for family, cells in rows.items():
        assert len(cells) == kinds + 3, family
        assert set(cells[:kinds]) <= {*table.MARKS.values(), "-"}, family
        if {"no", "failed", "WRONG"} & set(cells[:kinds]):
            assert f"{family}, " in reasons, family
    assert "WRONG" not in {cell for cells in rows.values() for cell in cells}


def test_a_page_without_a_family_is_seen(tmp_path: Path):
    changed = tmp_path / "models.md"
    changed.write_text("\n".join(line for line in PAGE.read_text().splitlines() if not line.startswith("| mixtral ")))
    assert tuple(table_rows(changed)) != listing.families()


def test_reasons_have_no_folders_of_this_machine():
    said = attempts._cut("[raise.operation] seen,\n at /opt/lib/site-packages/transformers/models/x.py:4 in f")
    assert said == "[raise.operation] seen, at transformers/models/x.py:4 in f"
    page = Path(__file__).parents[2] / "docs" / "models.md"
    assert "site-packages" not in page.read_text()
