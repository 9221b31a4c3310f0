"""The test examples of README fail when what they claim is not so; that they run is in test_snippets.py."""

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
