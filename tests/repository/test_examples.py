"""Each program of examples/ runs as it stands, and docs/examples.md shows it with what it prints."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
sys.path.insert(0, str(TOP / ".ci"))

import examples  # noqa: E402

PAGE = examples.PAGE.read_text()


def comparable(text: str) -> list[str]:
    """The lines, in any order as ranks print at once, without times and without tokens, which are as the CPU rounds."""
    text = re.sub(r"\d+\.\d+ ?s\b( \(\d+:\d\d:\d\d\))?", "N s", text)  # pytest adds the second from a minute on
    return sorted(re.sub(r"(wrote|tokens:) \[[\d, ]+\]", r"\1 [...]", text).splitlines())


def shown_output(example: examples.Example) -> str:
    return re.search(rf"^\$ {re.escape(example.command)}\n(.*?)^```$", PAGE, re.S | re.M)[1].strip()


@pytest.mark.parametrize("example", examples.EXAMPLES, ids=lambda example: example.file)
def test_it_runs_and_prints_what_the_page_shows(example):
    output = examples.run(example)
    assert comparable(output) == comparable(shown_output(example)), "run `make examples`"


def test_the_page_shows_every_program_as_it_stands():
    files = {file.name for file in (TOP / "examples").glob("*.py")}
    assert files == {example.file for example in examples.EXAMPLES}
    for example in examples.EXAMPLES:
        assert (TOP / "examples" / example.file).read_text() in PAGE, "run `make examples`"
    assert PAGE.startswith(examples.INTRO)


@pytest.mark.parametrize(("words", "says"), [
    ("own_model.py npu", "torchrun makes its ranks: torchrun --nproc-per-node 2 examples/own_model.py"),
    ("own_model.py gpu", "invalid choice: 'gpu'"),
    ("checkpoint.py", "ranks: TORCH_DEVICE_BACKEND_AUTOLOAD=0 torchrun --nproc-per-node 2 examples/checkpoint.py"),
    ("serve.py npu", "npu: torch_npu is not loaded"),
    ("choose.py gpu", "invalid choice: 'gpu'"),
])  # fmt: skip
def test_a_wrong_start_is_told_in_one_line(words, says):
    name, *arguments = words.split()
    command = [sys.executable, str(TOP / "examples" / name), *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", examples.AUTOLOAD)}
    environment["PYTHONPATH"] = str(TOP)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"{name}: error: ") and says in done.stderr


def test_one_line_differs_on_a_machine_with_npus():
    for file in ("own_model.py", "checkpoint.py", "serve.py"):
        text = (TOP / "examples" / file).read_text()
        assert len(re.findall(r"^    moe_lowering\.simulator\.enable", text, re.M)) == 1
        assert 'parser.add_argument("device", nargs="?", choices=("cpu", "npu"), default="cpu")' in text


def test_another_output_would_be_seen():
    shown = shown_output(examples.EXAMPLES[0])
    assert comparable(shown.replace("mc2", "allgather")) != comparable(shown)
    assert comparable("rank 1: wrote [1, 2]\na 0.1s") == comparable("a 0.22s\nrank 1: wrote [3]")


def test_a_program_that_fails_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "ROOT", tmp_path)
    with pytest.raises(RuntimeError, match="ended with 2"):
        examples.run(examples.EXAMPLES[-1])
