"""Runs the programs of examples/ and writes docs/examples.md: each as it stands, with its output as it was printed.

python .ci/examples.py    # `make examples`; tests/repository/test_examples.py runs the same and compares
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "examples.md"
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
NOISE = ("None", "*****")  # torch_npu prints the one, torchrun the other


class Example(NamedTuple):
    """One program: a heading of the page, the file, words before it on the command line, and what the page says."""

    title: str
    file: str
    words: tuple[str, ...]
    about: str

    @property
    def command(self) -> str:
        started = self.words[0] if self.words else "python"
        needed = [f"{AUTOLOAD}=0"] if started == "torchrun" else []
        return " ".join([*needed, started, *self.words[1:], f"examples/{self.file}"])


TORCHRUN = ("torchrun", "--nproc-per-node", "2")
EXAMPLES = (
    Example(
        "Your own model on two ranks",
        "own_model.py",
        TORCHRUN,
        "Two layers of [MoE](glossary.md#moe), each rank with half of the experts, lowered to [MC2](glossary.md#mc2)\n"
        'and compared with the whole model. With `comm="allgather"` the largest error of rank 0 is 0.238, '
        "at [near ties](glossary.md#near-ties).",
    ),
    Example(
        "A checkpoint on two ranks, W8A8, generate",
        "checkpoint.py",
        TORCHRUN,
        "Each rank loads its own experts ([loading](loading.md)) and quantises them to [W8A8](glossary.md#w8a8).\n"
        "Then `generate` compiles prefill and decode with transformers' own `CompileConfig`: prefill because of\n"
        "`prefill_chunk_size`, by whose pieces it runs. Without that, transformers compiles the decode step alone, and\n"
        "[an NPU has no kernel](use.md#what-you-are-told) for the [generic operators](glossary.md#generic-operators) of\n"
        "the other.",
    ),
    Example(
        "A test suite of your own",
        "test_decode.py",
        ("pytest", "-q"),
        "Graphs of rank 0 of 64, without weights and without other processes.",
    ),
    Example(
        "Serving with statistics",
        "serve.py",
        (),
        "A request joins a batch that is running; nothing is compiled again ([serving](serving.md)).",
    ),
    Example(
        "Choosing a deployment",
        "choose.py",
        (),
        "Two published models on four machines: what is taken at 128 tokens of a rank, and where that changes.",
    ),
)
INTRO = """\
# Examples

**What:** five whole programs, with what they print. **For:** whoever wants to begin with something that runs.
**Next:** [the user guide](use.md).

They lie in `examples/` of a checkout and run there with the environment that `make demo` makes, after `. .venv/bin/activate`.
On a machine with [NPUs](glossary.md#npu) the word `npu` behind a command runs the same file on them.
What differs is the line after `if device == "cpu"`.
Without [CANN](glossary.md#cann), `TORCH_DEVICE_BACKEND_AUTOLOAD=0` stands before `torchrun`, which imports torch by itself.
Each takes five to fifteen seconds and prints at the end. Warnings on stderr are no fault: torchrun speaks of `OMP_NUM_THREADS`,
torch_npu of padding sizes and of internal formats. `DeprecationWarning: invalid escape sequence` is of torch_npu's own files.
`make examples` renews this page.
"""


def run(example: Example) -> str:
    """What a program prints, without the lines that are torch_npu's.

    Raises:
        RuntimeError: it did not end with 0.
    """
    starters = {"torchrun": "torch.distributed.run", "pytest": "pytest"}
    module = ("-m", starters[example.words[0]]) if example.words else ()
    words = [*module, *example.words[1:], f"examples/{example.file}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop(AUTOLOAD, None)  # as in a shell of somebody new
    if example.words == TORCHRUN:
        environment[AUTOLOAD] = "0"
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=540, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{example.command} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        )
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    return "\n".join(line for line in lines if line and not line.startswith(NOISE))


def section(example: Example, output: str) -> str:
    code = (ROOT / "examples" / example.file).read_text("utf-8")
    return f"## {example.title}\n\n{example.about}\n\n```py\n{code}```\n\n```text\n$ {example.command}\n{output}\n```\n"


def main() -> int:
    sections = []
    for example in EXAMPLES:
        print(example.command, flush=True)
        sections.append(section(example, run(example)))
    PAGE.write_text("\n".join([INTRO, *sections]), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
