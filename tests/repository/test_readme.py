"""README: its tests fail when what they claim is not so, and its report is the one that is printed. That its code runs is in
test_snippets.py."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCK = next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "def test_" in b)


def functions():
    namespace = {}
    exec(BLOCK, namespace)
    return {name: f for name, f in namespace.items() if name.startswith("test_")}


def test_examples_can_fail():
    wrong = BLOCK.replace('comm="fused_mc2"', 'comm="allgather"').replace('code="mc2.x_dtype"', 'code="mc2.hidden"')
    assert wrong != BLOCK
    namespace = {}
    exec(wrong, namespace)
    for name in functions():
        with pytest.raises(AssertionError):
            namespace[name]()


def test_ci_runs_the_second_command_of_readme():
    commands = [line.strip() for line in README.splitlines() if line.startswith("    make ")]
    assert commands == ["make demo", "make test"]
    assert commands[1] in (Path(__file__).parents[2] / ".ci" / "run").read_text()


def test_the_report_is_the_one_that_is_printed(capsys):
    blocks = re.findall(r"```(?:python|text)\n(.*?)```", README, re.S)
    place = next(index for index, block in enumerate(blocks) if "print(lowered.report)" in block)
    exec(blocks[place], {})
    printed, shown = comparable(capsys.readouterr().out), comparable(blocks[place + 1])
    assert printed.startswith(shown)
    assert not printed.startswith(shown.replace("fused_mc2", "mc2"))


def comparable(text):
    """Without the time that it took, and however the lines are broken."""
    return " ".join(re.sub(r"took [\d.]+ ms", "took N ms", text).split())


def test_the_set_up_is_the_first_code():
    first = re.search(r"^(    .+\n)+|^```", README, re.M)[0]
    assert first.split() == ["make", "demo", "make", "test"]
