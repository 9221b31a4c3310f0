"""Help, options, wrong usage and completion of the commands."""

from __future__ import annotations

import json
import re
import sys
import types

import pytest
from test_explain import BLOCK, command

from moe_lowering import cli
from moe_lowering.cli import commands, completion
from moe_lowering.cli.deployments import make_deployment
from moe_lowering.cli.lower.early_refusal import Policy
from moe_lowering.cli.lower.prepare import deployment_facts
from moe_lowering.report.width import WIDTH

# ----------------------------------------------------------------------------------------------- help, lower's options


def test_the_command_alone_prints_its_help(capfd):
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    out, err = capfd.readouterr()
    assert (ended.value.code, err) == (0, "")
    for name in ("lower", "explain", "matrix", "models"):
        assert name in out


@pytest.mark.parametrize("name", ["", "lower", "explain", "matrix", "models", "simulate"])
def test_a_help_fits_in_80_columns_and_says_the_same_in_wide_ones(capfd, monkeypatch, name):
    pages = {}
    for columns in ("80", "300"):
        monkeypatch.setenv("COLUMNS", columns)
        with pytest.raises(SystemExit):
            cli.main([*([name] if name else []), "--help"])
        pages[columns] = capfd.readouterr().out
    assert max(map(len, pages["80"].splitlines())) <= 80
    # A shell goes on behind a backslash
    whole = {columns: re.sub(r" \\\n +", " ", page) for columns, page in pages.items()}
    examples = [line for line in whole["80"].splitlines() if line.startswith("  moe-lowering ")]
    assert examples and examples == [line for line in whole["300"].splitlines() if line.startswith("  moe-lowering ")]
    assert whole["80"].split() == whole["300"].split() or name == "lower", (
        "no word is lost; lower's usage is in columns"
    )
    assert max(map(len, pages["300"].partition("examples:")[2].splitlines())) <= WIDTH, (
        "the twin: it is no wider than a report"
    )


# Of `explain` and `lower`: an option, and what it makes of the deployment or the policy.
OPTIONS = [
    ("--buffer-mb 300", "hccl_buffer_mb", 300),
    ("--cann 8.5.0", "cann", "8.5.0"),
    ("--weight-format nd", "weight_format", "nd"),
    ("--max-tokens 999", "max_tokens", 999),
    ("--unequal-tokens --max-tokens 999", "equal_tokens", False),
    ("--hierarchy", "mc2_hierarchy", True),
    ("--soc a2", "soc", "A2"),
    ("--fused-mode 2", "fused_mode", 2),
    ("--provider none", "providers", ()),
    ("--ranks-per-node 4", "ranks_per_node", 4),
    ("--unpermute-operator finalize_routing", "unpermute_operator", "finalize_routing"),
]


@pytest.mark.parametrize(("option", "field", "value"), OPTIONS, ids=[option for option, _, _ in OPTIONS])
def test_lower_takes_what_explain_takes(capfd, option, field, value):
    request = commands.parse(["lower", "moe", *option.split()])
    made, bare = make_deployment(request), make_deployment(commands.parse(["lower", "moe"]))
    assert getattr(made, field) == value != getattr(bare, field)
    explained = json.loads(command(capfd, f"{BLOCK} {option} --json")[1])["deployment"]
    assert explained[field] == ({} if value == () else value)
    if "--ranks" not in option and "--fused" not in option and "--max" not in option:
        assert deployment_facts(request) != deployment_facts(commands.parse(["lower", "moe"])), "the report says it"


def test_policy_and_overlap_reach_the_pass(capfd):
    given = ["lower", "moe", "--fake", "--layers", "1", "--ep", "16", "--tokens", "8", "--json"]
    for policy in ("auto", "vllm_ascend_main"):
        assert cli.main([*given, "--policy", policy, "--overlap"]) == 0
        (block,) = json.loads(capfd.readouterr().out)["blocks"]
        assert ("vllm_ascend_main selects it" in block["reason"]) == (policy == "vllm_ascend_main")
        assert any("overlap" in note for note in block["notes"]), block["notes"]
    assert cli.main(given) == 0
    assert not any("overlap" in note for note in json.loads(capfd.readouterr().out)["blocks"][0]["notes"])
    assert Policy("mc2", "fixed").name == "fixed"


@pytest.mark.parametrize(("given", "says"), [
    ("--max-tokens 16", "argument --max-tokens: is 16, and a rank runs 32 tokens; accepted: 32 or more"),
    ("--policy fixed", "argument --policy: is fixed without --comm; accepted: with --comm {allgather,"),
    ("--comm mc2 --policy vllm_ascend_main", "argument --policy: is vllm_ascend_main with --comm mc2, which leaves nothing"),
    ("--policy best", "argument --policy: is 'best'; accepted: auto, "),
    ("--cann new", "argument --cann: is 'new'; accepted: a version such as"),
    ("--buffer-mb 0", "argument --buffer-mb: is '0'; accepted: an integer from 1"),
    ("--weight-format nz16", "argument --weight-format: is 'nz16'; accepted: nd, nz"),
    ("--soc A2,A3", "argument --soc: is 'A2,A3'; accepted: one SoC (explain takes lists): A2 (910B), A3 (910C"),
])  # fmt: skip
def test_wrong_usage_of_lower(capfd, given, says):
    assert cli.main(["lower", "moe", *given.split()]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err, err


# ----------------------------------------------------------------------------------------------------------- completion


@pytest.fixture
def completers(monkeypatch):
    """What the one function of argcomplete, which is an extra, finds on the parser: completers by command and field."""
    asked = []
    files = types.SimpleNamespace(
        autocomplete=asked.append, FilesCompleter=lambda: lambda prefix, **more: [f"{prefix}*"]
    )
    monkeypatch.setitem(sys.modules, "argcomplete", files)
    monkeypatch.delenv(completion.IN_COMPLETION, raising=False)
    commands.parse(["explain", "moe"])
    assert not asked
    monkeypatch.setenv(completion.IN_COMPLETION, "1")
    commands.parse(["explain", "moe"])
    (of_commands,) = (action.choices for action in asked[0]._actions if action.choices)
    yield {
        name: {action.dest: action.completer for action in parser._actions if hasattr(action, "completer")}
        for name, parser in of_commands.items()
    }
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    commands.parse(["explain", "moe"])  # the extra is gone


@pytest.mark.parametrize(("command", "field", "prefix", "answer"), [
    ("explain", "model", "kimi_k", ["kimi_k2"]),
    ("lower", "model", "qwen3_m", ["qwen3_moe"]),
    ("lower", "model", "llam", ["llama4", "llama4_text"]),  # llama has no experts
    ("explain", "model", "./con", ["./con*"]),
    ("explain", "model", "docs", ["docs*"]),
    ("simulate", "soc", "A", ["A2", "A3", "A5"]),
    ("explain", "socs", "A2,A", ["A2,A3", "A2,A5"]),
    ("explain", "socs", "a2,a", ["a2,a2", "a2,a3", "a2,a5"]),
    ("explain", "quants", "none,w8", ["none,w8a8"]),
    ("explain", "provider", "v", ["vllm_ascend=0.23.0"]),
    ("matrix", "comm", "m", ["mc2"]),
    ("matrix", "ep", "", ["1", "2", "4"]),
    ("models", "only", "olmoe,mixt", ["olmoe,mixtral"]),
    ("models", "ways", "hook,", ["hook,trace"]),
])  # fmt: skip
def test_a_shell_that_asks_is_answered(completers, command, field, prefix, answer):
    assert completers[command][field](prefix=prefix) == answer


def test_what_has_choices_or_is_free_gets_no_completer(completers):
    assert {"comm", "ep", "quant", "dtype"}.isdisjoint(completers["lower"]) and "hidden" not in completers["explain"]


@pytest.mark.parametrize("given", ["--quant W8A8", "--comm AllGather", "--quant none,W8A8"])
def test_words_in_upper_case_are_those_words(capfd, given):
    _, upper, _ = command(capfd, f"{BLOCK} --ep 16 {given}")
    assert upper and upper == command(capfd, f"{BLOCK} --ep 16 {given.lower()}")[1]


@pytest.mark.parametrize(("given", "text"), [
    ("--fused-mode 2", "fused mode 2, in vLLM additional_config's enable_fused_mc2"),
    ("--hierarchy", "prices and bytes of MC2 are those of one level"),
])  # fmt: skip
def test_what_is_not_priced_or_not_said_is_assumed(capfd, given, text):
    (with_it, without) = (" ".join(command(capfd, f"{BLOCK} --ep 16 {more}")[1].split()) for more in (given, ""))
    assert text in with_it and text not in without


def test_lists_may_have_spaces_and_capitals():
    given = ["moe", "--ep", "16, 32", "--soc", " a2,A3", "--quant", "none, W8A8", "--tokens", "1..8 , 64"]
    request = commands.parse(["explain", *given])
    assert (request.eps, request.socs, request.quants) == ((16, 32), ("A2", "A3"), ("none", "w8a8"))
    assert request.counts == ((1, 8), (64, 64))
    assert commands.parse(["matrix", "--comm", "MC2, fused_mc2"]).comm == ("mc2", "fused_mc2")
    assert commands.parse(["models", "--ways", "Hook ,trace"]).ways == ("hook", "trace")
