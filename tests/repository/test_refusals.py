"""docs/refusals.md has every code of the limit tables, as they are now."""

import argparse
import dataclasses
import re
import sys
from pathlib import Path

from moe_lowering import Deployment
from moe_lowering.cli.explain import arguments as explain
from moe_lowering.cli.lower import arguments as lower
from moe_lowering.cli.option_names import FIELD_OPTIONS, OTHER_NAMES
from moe_lowering.limits.table import load

TOP = Path(__file__).parents[2]
sys.path.insert(0, str(TOP / ".ci"))

import refusals  # noqa: E402

# Codes that are no rows of the tables, as the source has them in strings.
OTHER = re.compile(
    r'"\[?((?:foreign|raise|router|overlap|experts|subgraph|cost|memory|models|call|capture)\.[a-z_]+)[\]" ]'
)


def listed() -> str:
    return refusals.PAGE.read_text().partition(refusals.BEGIN)[2].partition(refusals.END)[0].strip()


def test_the_list_is_that_of_the_tables():
    assert listed() == refusals.listing(load()), "run `make refusals`"
    assert all(f"| `{row.code}` |" in listed() for row in load())


def test_each_line_has_one_rule():
    """What a code asks for elsewhere stands in a line of its own; what is as above is not written again."""
    lines = [line for line in listed().splitlines() if line.startswith("| `gmm.bias_dtype` |")]
    rules = dict.fromkeys(refusals.rule(row) for row in load() if row.code == "gmm.bias_dtype")
    assert len(lines) == len(rules) > 3 and all(rule in line for rule, line in zip(rules, lines, strict=True))
    assert f"| {refusals.ABOVE} |" not in lines[0] and f"| {refusals.ABOVE} |" in lines[1]


def test_the_list_is_for_people():
    """No value of Python's, and no condition that cannot be understood."""
    assert not re.search(r"\(text=|`False` is|one of `,|one of `[^`,]*`|\|  \|", listed())
    assert any(f"{refusals.NEVER} (" in line and "vllm_ascend>=0.24" in line for line in listed().splitlines())
    assert '`comm_alg` one of `"", fullmesh' in listed() and "`has_clamps` is `False` (A2, A3; `cann<8.5`)" in listed()


def test_the_options_of_fields_are_those_of_the_commands():
    """As the commands name them below a report."""
    cells = re.split(r" *\| *", refusals.PAGE.read_text().partition("| field | option |")[2].partition("\n\n")[0])
    fields = [re.findall(r"`([\w=]+)", cell) for cell in cells if re.match(r"`[a-z]", cell)]
    options = [re.findall(r"`(--[\w-]+)", cell) for cell in cells if cell.startswith("`--")]
    named = {f: o for fs, os in zip(fields, options, strict=True) for f, o in zip(fs, os, strict=True)}
    assert named.pop("capture=False") == "--no-capture" and named == FIELD_OPTIONS
    assert {name.partition("=")[0] for name in FIELD_OPTIONS} < {field.name for field in dataclasses.fields(Deployment)}
    commands = argparse.ArgumentParser().add_subparsers()
    for arguments in (explain, lower):
        arguments.add_command(commands)
    for parser in commands.choices.values():
        assert set(FIELD_OPTIONS.values()) <= set(parser._option_string_actions)
    assert set(OTHER_NAMES.values()) <= set(commands.choices["explain"]._option_string_actions)


def test_the_other_lists_are_those_of_the_pass():
    page = refusals.PAGE.read_text()
    assert page.partition(refusals.OTHERS)[2].partition(refusals.END_OF_OTHERS)[0].strip() == refusals.others()
    assert "| `foreign.expert_loop` | a loop over experts | write the layer with" in page


def test_every_code_that_is_printed_can_be_looked_up():
    """In a table of some page, where docs/refusals.md sends by the word in front of the dot."""
    sources = [path.read_text() for path in (TOP / "moe_lowering").rglob("*.py")]
    codes = {code for text in sources for code in OTHER.findall(text)} - {"capture.c"}
    page = refusals.PAGE.read_text()
    tables = "\n".join(
        line for each in (TOP / "docs").glob("*.md") for line in each.read_text().splitlines() if line.startswith("|")
    )
    assert len(codes) > 120 and {code for code in codes if f"`{code}`" not in tables} == set()
    words = {code.partition(".")[0] for code in codes} - {"capture"}
    assert {word for word in words if f"| `{word}` |" not in page} == set(), "capture.* are rows of the tables"


def test_another_limit_would_be_seen():
    first, *others = load()
    assert refusals.listing((dataclasses.replace(first, advice="pray"), *others)) != listed()
    assert refusals.listing(tuple(others)) != listed()
