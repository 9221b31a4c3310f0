"""Width and colour of the commands; torch_npu's stray lines. Progress: test_progress.py."""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch
from test_explain import BLOCK, command

from moe_lowering import cli, number_words, simulator, stray_output
from moe_lowering.cli import terminal
from moe_lowering.cli.commands import parse
from moe_lowering.cli.explain.arguments import COLOURS
from moe_lowering.cli.usage import first_sentence
from moe_lowering.model_configs.presets import PRESETS
from moe_lowering.number_words import count_of
from moe_lowering.report.text import labelled_text
from moe_lowering.report.width import NARROWEST, WIDTH, report_width, use_width

# ---------------------------------------------------------------------------------------------------------------- width


@pytest.mark.parametrize(("columns", "used"), [("", WIDTH), ("80", 80), ("92", 92), ("40", NARROWEST), ("500", WIDTH),
                                               ("0", WIDTH), ("wide", WIDTH), ("٣", WIDTH)])  # fmt: skip
def test_reports_are_as_wide_as_the_terminal(monkeypatch, columns, used):
    monkeypatch.setenv("COLUMNS", columns)
    with use_width(terminal.width()):
        assert report_width() == used
        lines = labelled_text("label", "word " * 60 + "x" * 300).splitlines()
    assert used - 6 < max(map(len, lines)) <= used
    assert report_width() == WIDTH, "as it was"


@pytest.mark.parametrize(("of", "used"), [({}, WIDTH), ({"stdout": 90}, 90), ({"stderr": 84}, 84), ({"stderr": 40}, NARROWEST),
                                          ({"stdout": 90, "stderr": 84}, 90), ({"stdin": 84}, WIDTH)])  # fmt: skip
def test_a_piped_report_is_as_wide_as_the_terminal_that_a_pager_shows_it_on(monkeypatch, of, used):
    monkeypatch.delenv("COLUMNS", raising=False)
    streams = {STREAMS[name]: columns for name, columns in of.items()}

    def terminal_size(number):
        if number not in streams:
            raise OSError("Inappropriate ioctl for device")
        return os.terminal_size((streams[number], 24))

    monkeypatch.setattr(os, "get_terminal_size", terminal_size)
    for name in STREAMS:
        monkeypatch.setattr(sys, name, _Stream(name))
    with use_width(terminal.width()):
        assert report_width() == used


STREAMS = {"stdin": 0, "stdout": 1, "stderr": 2}


class _Stream:
    def __init__(self, name):
        self.name = name

    def fileno(self):
        return STREAMS[self.name]


@pytest.mark.parametrize(("columns", "on_terminal", "used"), [("80", True, 80), ("90", True, 90), ("40", True, NARROWEST),
                                                              ("300", True, WIDTH), ("80", False, WIDTH)])  # fmt: skip
def test_a_report_that_a_program_prints_is_as_wide_as_its_terminal(monkeypatch, columns, on_terminal, used):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(isatty=lambda: on_terminal))
    assert report_width() == used
    monkeypatch.setattr(sys, "stdout", None)
    assert report_width() == WIDTH


# Every command and every report of it, none of which starts a process here.
REPORTS = {
    "explain": f"explain {BLOCK} --ep 16 --tokens 600 --why mc2 --sweep tokens=1..900",
    "explain, refused": f"explain {BLOCK} --ep 16 --comm mc2 --tokens 600 --dtype float32",
    "explain, absurd": "explain moe --ep 2 --tokens 2147483647",
    "explain, table": f"explain {BLOCK} --ep 16,32 --tokens 1..4096",
    "lower": "lower moe --fake --layers 1 --ep 16 --tokens 64",
    "lower, refused": "lower moe --fake --layers 1 --ep 16 --comm mc2 --tokens 600 --provider none",
    "matrix": "matrix --ep 1 --comm allgather --quant none --scenario even",
    "models": "models --only jetmoe --ways hook --dtypes float32 --shapes static",
    "lower, wrong": "lower moe --soc A9",
    "explain, wrong": "explain moe --ep 0",
    "matrix, wrong": "matrix --comm mc3",
    "models, wrong": "models --only nosuch",
    "simulate, wrong": "simulate --soc A9 -- true",
    "nothing to lower": "lower",
    "no such option": "models --nothing",
    "no such command": "lowered",
}


@pytest.mark.parametrize("given", REPORTS.values(), ids=REPORTS)
def test_no_line_is_wider_than_80_columns_and_nothing_is_coloured_in_a_pipe(capfd, monkeypatch, given):
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    code = cli.main(given.split())
    out, err = capfd.readouterr()
    assert max(map(len, out.splitlines()), default=0) <= 80, [line for line in out.splitlines() if len(line) > 80]
    assert "\033" not in out + err and "\r" not in out + err
    assert (code == 2) == (not out) and (code != 2 or err.count("\n") == 1), "of a wrong command one line"
    assert code != 2 or re.match(r"moe-lowering: error: argument \S+: .+; accepted: ", err), "which says what to do"


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"FORCE_COLOR": "1", "NO_COLOR": "1"}],
                         ids=["NO_COLOR", "TERM=dumb", "both"])  # fmt: skip
@pytest.mark.parametrize("given", [REPORTS[name] for name in ("explain", "explain, table", "lower", "lower, refused")])
def test_nothing_is_coloured_on_a_terminal_that_has_no_colours(capfd, monkeypatch, environment, given):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(terminal, "is_terminal", lambda stream: True)
    cli.main(given.split())
    assert "\033" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("given", [REPORTS["explain"], REPORTS["explain, table"]])
def test_colours_can_be_forced_into_a_pipe(capfd, monkeypatch, given):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    cli.main(given.split())
    assert "\033[" in capfd.readouterr().out, "the twin"


@pytest.mark.parametrize("given", [
    f"{BLOCK} --ep 16 --tokens 600 --dtype float32 --buffer-mb 10",
    f"{BLOCK} --ep 16 --provider none --buffer-mb 200 --sweep tokens=1..8192 --why mc2",
    f"{BLOCK} --ep 16 --comm mc2 --tokens 600 --hierarchy --no-capture",
])  # fmt: skip
def test_explain_fits_in_80_columns(capfd, monkeypatch, given):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, command(capfd, given)[1].splitlines())) <= 80
    monkeypatch.setenv("COLUMNS", "100")
    assert max(map(len, command(capfd, given)[1].splitlines())) > 80, "the twin: what is there fills the line"


def test_lower_fits_in_80_columns(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert (
        cli.main(["lower", "moe", "--fake", "--ep", "16", "--comm", "mc2", "--tokens", "600", "--provider", "none"])
        == 1
    )
    out, err = capfd.readouterr()
    assert max(map(len, out.splitlines())) <= 80
    assert "\033" not in out + err
    assert not re.search(r"^\[ *\d", err, re.M), "no progress where stderr is no terminal"


# --------------------------------------------------------------------------------------------------------------- colour


@pytest.mark.parametrize(("environment", "on_terminal", "coloured"), [
    ({}, True, True),
    ({}, False, False),
    ({"NO_COLOR": "1"}, True, False),
    ({"NO_COLOR": ""}, True, True),
    ({"TERM": "dumb"}, True, False),
    ({"TERM": "xterm"}, True, True),
    ({"FORCE_COLOR": "1"}, False, True),
    ({"FORCE_COLOR": "1", "TERM": "dumb"}, True, True),
    ({"FORCE_COLOR": ""}, False, False),
    ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False),
])  # fmt: skip
def test_what_decides_on_colour(monkeypatch, environment, on_terminal, coloured):
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(isatty=lambda: on_terminal))
    assert [terminal.use_colour(choice) for choice in COLOURS] == [coloured, True, False]


# ---------------------------------------------------------------------------------------------------------- stray lines


def test_torch_npus_stray_lines_are_kept_away_and_others_are_not(capfd):
    simulator.enable()
    module = sys.modules[stray_output.MODULE]
    x, ids, scale = (
        torch.empty(4, 8, device="meta"),
        torch.empty(4, 2, dtype=torch.int32, device="meta"),
        torch.empty(4, device="meta"),
    )

    def route():
        torch.ops.npu.npu_moe_init_routing_v2(
            x, ids, scale=scale, active_num=8, expert_num=4, expert_tokens_num_type=1, expert_tokens_num_flag=True,
            active_expert_range=[0, 4], quant_mode=-1, row_idx_type=0,
        )  # fmt: skip

    route()
    assert capfd.readouterr().out == ""
    exec(
        "def other(x_dtype, y):\n    print(x_dtype)\n    print(y)\n    print(x_dtype, y)\n",
        namespace := vars(module).copy(),
    )
    namespace["other"](None, "kept")
    assert capfd.readouterr().out == "kept\nNone kept\n"
    silenced = vars(module).pop("print")
    try:
        route()
        assert capfd.readouterr().out == "None\n", "the twin: it is still printed"
    finally:
        vars(module)["print"] = silenced


@pytest.mark.parametrize("given", [[], ["lower"], ["explain"], ["matrix"], ["models"], ["simulate"]])
def test_helps_fit_in_80_columns_and_examples_can_be_copied(capfd, monkeypatch, given):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main([*given, "--help"])
    out = capfd.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    text = out.replace(" \\\n    ", "").replace("./config.json", "mixtral")
    examples = [line for line in text.splitlines() if line.startswith("  moe-lowering ")]
    for line in examples if given != ["simulate"] else ():
        parse(shlex.split(line)[1:])
    if given == ["explain"]:
        assert not [name for name in PRESETS if name not in out]


# ---------------------------------------------------------------------------------------------------------------- words


def test_an_error_is_one_line_on_a_terminal_and_in_a_pipe(monkeypatch):
    """A terminal breaks it where it is full, and what is copied from it has no break."""
    monkeypatch.setenv("COLUMNS", "80")
    for on_terminal in (True, False):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda answer=on_terminal: answer, raising=False)
        monkeypatch.setattr(sys, "stderr", stream)
        assert cli.main(["explain", "deepseek_v33"]) == 2
        lines = stream.getvalue().splitlines()
        assert len(lines) == 1
        assert lines[0].endswith("a transformers model type (mixtral, qwen3_moe, ...), or a path to a config.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("backend='npugraph_ex' raised:\nTypeError: no\n\nSet TORCH", "backend='npugraph_ex' raised: TypeError: no"),
        ("no such thing\nand more", "no such thing"),
        ("", ""),
    ],
)
def test_the_last_line_says_the_cause_that_the_first_one_announces(text, said):
    assert first_sentence(text) == said


def test_one_thing_is_no_plural():
    assert [count_of(number, "layer") for number in (0, 1, 2)] == ["0 layers", "1 layer", "2 layers"]
    assert [count_of(number, "family", "families") for number in (1, 2)] == ["1 family", "2 families"]
    assert count_of("T (at most 1)", "row") == "T (at most 1) rows"


def test_a_label_that_is_too_long_stands_above_its_text():
    columns = " " * 20
    assert (
        labelled_text("model.layers.{0-60}.mlp", "left as it was")
        == f"  model.layers.{{0-60}}.mlp\n{columns}left as it was"
    )
    assert (
        labelled_text("x" * 17, "a text") == f"  {'x' * 17} a text" and labelled_text("x" * 18, "") == f"  {'x' * 18}"
    )


def test_counts_are_put_in_words_by_one_function():
    """No text with a number, and an s that is put there or left out by hand."""
    package = Path(number_words.__file__).parent
    by_hand = re.compile(r"""['"]s['"] ?(?:if|\*)|else ['"]s['"]""")
    assert not [str(file) for file in package.rglob("*.py") if by_hand.search(file.read_text())]
