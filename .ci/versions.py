"""Runs selected tests and commands with each pair of torch and torch_npu, and writes the table of docs/versions.md.

    python .ci/versions.py              # all pairs; `make versions`
    python .ci/versions.py 2.10 2.14    # these; `make versions VERSIONS="2.10 2.14"`

Each pair has a virtual environment in .venvs/, which is kept. torch is installed without its dependencies: of a CUDA build the
CUDA libraries are replaced (cuda_standins.py), of a CPU build nothing is. Rows of pairs that are not run stay in the table.
Exit code 0: all is green; 1: something failed or could not be installed; 2: wrong usage.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "versions.md"
START, END = "<!-- results of make versions -->", "<!-- end of results -->"
TIMEOUT = 3600  # seconds of one command
HEAD = "| torch | torch_npu | transformers | tests | commands | date, machine |\n|---|---|---|---|---|---|\n"

# torch -> torch_npu, each the last of its line.
PAIRS = {
    "2.10.0": "2.10.0.post4",
    "2.11.0": "2.11.0.post3",
    "2.12.0": "2.12.0.post3",
    "2.13.0": "2.13.0",
    "2.14.0": "2.14.0",
}
# What torch and the tests import; torch_npu and transformers are beside them.
NEEDED = [
    "filelock",
    "typing-extensions",
    "sympy",
    "networkx",
    "jinja2",
    "fsspec",
    "setuptools>=77",
    "numpy",
    "protobuf",
    "packaging",
    "pyyaml",
    "pytest",
    "pytest-xdist",
    "expecttest",
    "tomli",
    "transformers",
]
TESTS = tuple(
    f"tests/test_{name}.py"
    for name in [
        "custom_ops",
        "custom_ops_contract",
        "fused_wrappers",
        "raising",
        "judging",
        "lowering",
        "values",
        "quantised_chains",
        "moe_experts",
        "npu_kernels_local",
        "npu_kernels_distribute",
        "npu_kernels_matmul",
        "npu_kernels_permuting",
        "npu_kernels_quantised",
        "simulator_device",
        "simulator_capture",
        "simulator_npugraph_ex",
        "torchair_conversion",
        "compile_cache",
        "transformers",
        "explain",
    ]
)
COMMANDS = (
    "lower qwen3_moe --capture",
    "lower qwen3_moe --ep 2 --comm allgather --capture",
    "lower qwen3_moe --ep 2 --comm alltoall --capture",
    "lower qwen3_moe --ep 2 --comm mc2 --capture",
    "lower qwen3_moe --ep 2 --comm fused_mc2 --capture",
    "lower qwen3_moe --quant w8a8",
    "lower gpt_oss --dynamic",
    "lower deepseek_v3 --fake --ep 64 --tokens 64",
)


class Result(NamedTuple):
    """What became of one pair; the columns of its row."""

    torch: str
    torch_npu: str
    transformers: str
    tests: str
    commands: str
    green: bool

    def row(self) -> str:
        when = f"{datetime.date.today()}, {machine()}"
        return f"| {self.torch} | {self.torch_npu} | {self.transformers} | {self.tests} | {self.commands} | {when} |"


def main(words: Sequence[str]) -> int:
    try:
        chosen = select(words)
    except ValueError as error:
        print(f"versions: {error}", file=sys.stderr)
        return 2
    results = []
    for torch in chosen:
        result = check(torch, PAIRS[torch])
        print(result.row(), flush=True)
        results.append(result)
        PAGE.write_text(updated(PAGE.read_text(), {torch: result.row()}))
    return 0 if all(result.green for result in results) else 1


def select(words: Iterable[str]) -> list[str]:
    """The torch versions that the words name, in the order of PAIRS; all without words.

    Raises:
        ValueError: a word that names none; accepted are "2.10" and "2.10.0".
    """
    by_word = {name: torch for torch in PAIRS for name in (torch, torch.rpartition(".")[0])}
    words = list(words)
    for word in words:
        if word not in by_word:
            raise ValueError(f"unknown version {word!r}; accepted: {', '.join(t.rpartition('.')[0] for t in PAIRS)}")
    named = {by_word[word] for word in words} or set(PAIRS)
    return [torch for torch in PAIRS if torch in named]


def check(torch: str, torch_npu: str) -> Result:
    """Install one pair and run all that is to be run with it."""
    home = ROOT / ".venvs" / f"torch-{torch}"
    if reason := install(home, torch, torch_npu):
        return Result(torch, torch_npu, "-", f"not installed: {reason}", "-", False)
    python = str(home / "bin" / "python")
    version = run(python, "-c", "import importlib.metadata as m; print(m.version('transformers'))").stdout.strip()
    tested = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, log=home / "tests.log")
    failed = []
    for command in COMMANDS:
        began = time.monotonic()
        code = run(python, "-m", "moe_lowering", *shlex.split(command), log=home / "command.log").returncode
        print(f"torch {torch}: {command}: exit {code}, {time.monotonic() - began:.0f} s", flush=True)
        if code:
            failed.append(f"`{command}` exit {code}")
    commands = "; ".join(failed) or f"{len(COMMANDS)} exit 0"
    return Result(torch, torch_npu, version, summary(tested.stdout), commands, not (tested.returncode or failed))


def install(home: Path, torch: str, torch_npu: str) -> str:
    """Make the virtual environment unless it is complete; "" or why it cannot be made."""
    ready, python = home / ".ready", home / "bin" / "python"
    if ready.exists():
        return ""
    site_packages = home / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    constraints = home / "constraints.txt"
    pip = (str(python), "-m", "pip", "install", "--quiet")
    steps = (
        (sys.executable, "-m", "venv", str(home)),
        (*pip, "--no-deps", f"torch=={torch}"),
        (*pip, "--no-deps", f"torch-npu=={torch_npu}"),
        (sys.executable, str(ROOT / ".ci" / "cuda_standins.py"), str(site_packages)),
        (*pip, "-c", str(constraints), *NEEDED),
    )
    for step in steps:
        done = run(*step)
        if done.returncode:
            lines = [line for line in done.stdout.splitlines() if line.strip()] or ["no output"]
            return f"`{Path(step[0]).name} {' '.join(step[1:5])}`: {lines[-1].strip()}".replace("|", "\\|")
        if step is steps[0]:
            lines = (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
            constraints.write_text("".join(line for line in lines if not line.startswith("torch")))
    ready.touch()
    return ""


def run(*command: str, log: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run in the project with its sources first; output and errors together, also in ``log``. A hang ends with code 124."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MOE_LOWERING_SEED": os.environ.get("MOE_LOWERING_SEED", "1")}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        text = said if isinstance(said, str) else said.decode(errors="replace")
        done = subprocess.CompletedProcess(command, 124, f"{text}\nno end after {TIMEOUT} s")
    if log is not None:
        log.write_text(done.stdout)
    return done


def summary(output: str) -> str:
    """ "212 passed" or "3 failed, 209 passed", from what pytest printed last."""
    counts = re.findall(r"\d+ (?:failed|passed|errors?|skipped|xfailed|xpassed)\b", (output.splitlines() or [""])[-1])
    return ", ".join(counts) or "pytest gave no result"


def machine() -> str:
    return f"{os.cpu_count()} cores {platform.machine()}, Python {platform.python_version()}"


def updated(page: str, rows: dict[str, str]) -> str:
    """The page with these rows (by torch version) in its table of results, the others as they were.

    Raises:
        ValueError: the page has no such table.
    """
    before, start, rest = page.partition(START)
    table, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{PAGE.name} has no {START!r} with {END!r} after it")
    old = {line.split("|")[1].strip(): line for line in table.splitlines() if re.match(r"\| \d", line)}
    merged = {**old, **rows}
    body = "".join(f"{merged[torch]}\n" for torch in PAIRS if torch in merged)
    return f"{before}{START}\n\n{HEAD}{body}\n{END}{after}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
