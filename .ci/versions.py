"""Runs selected tests and commands with each pair of torch and torch_npu, and writes the table of docs/versions.md.

    python .ci/versions.py              # all pairs; `make versions`
    python .ci/versions.py 2.10 2.14    # these; `make versions VERSIONS="2.10 2.14"`

Each pair has an environment (``environments``) of the Python that runs this: `make versions PYTHON=python3.13`. What is run is a
copy of the sources as they were when the run began. Rows of other pairs and other Pythons stay in the table.
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

from environments import (
    PAIRS,
    ROOT,
    EnvironmentFailure,
    copy_sources,
    make_environment,
    replace_between,
    run_and_log,
)

PAGE = ROOT / "docs" / "versions.md"
START, END = "<!-- results of make versions -->", "<!-- end of results -->"
HEAD = (
    "| torch | Python | torch_npu | transformers | tests | commands | date, machine |\n|---|---|---|---|---|---|---|\n"
)
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"

EXTRA = ("pytest-xdist", "expecttest", "transformers")
TESTS = tuple(
    f"tests/{name}.py"
    for name in [
        "custom_ops/test_custom_ops",
        "custom_ops/test_grouped_mlp",
        "custom_ops/test_custom_ops_contract",
        "custom_ops/test_fused_wrappers",
        "passes/test_find_blocks",
        "passes/test_legality",
        "passes/test_lowering",
        "passes/test_fake_values",
        "passes/test_new_nodes",
        "passes/test_erased_nodes",
        "passes/test_known_results",
        "passes/test_tapes",
        "passes/test_private_ways",
        "passes/test_quantised_chains",
        "passes/test_quantised_chain_numbers",
        "package/test_moe_experts",
        "simulator/test_npu_kernels_local",
        "simulator/test_npu_kernels_distribute",
        "simulator/test_npu_kernels_matmul",
        "simulator/test_npu_kernels_permute",
        "simulator/test_npu_kernels_quantised",
        "simulator/test_npu_kernels_swiglu_quant",
        "simulator/test_simulator_device",
        "simulator/test_simulator_capture",
        "simulator/test_simulator_npugraph_ex",
        "backends/test_torchair_conversion",
        "backends/test_torchair_processes",
        "backends/test_compile_cache",
        "integrations/test_transformers",
        "cli/test_explain",
        "serving/test_serving",
        "serving/test_serving_refusals",
        "testing/test_testing_ranks",
        "custom_ops/test_alltoall_experts",
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
        columns = (self.torch, PYTHON, self.torch_npu, self.transformers, self.tests, self.commands, when)
        return f"| {' | '.join(columns)} |"


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
        PAGE.write_text(updated(PAGE.read_text(), {(torch, PYTHON): result.row()}))
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
    """Make the environment of one pair and run all that is to be run with it."""
    try:
        python = make_environment(f"torch-{torch}-python{PYTHON}", torch, EXTRA)
        sources = copy_sources(python.parent.parent / "sources")
    except EnvironmentFailure as error:
        print(f"torch {torch}: {error}", file=sys.stderr, flush=True)
        reason = str(error).splitlines()[-1].strip().replace("|", "\\|")
        return Result(torch, torch_npu, "-", f"not installed: {reason}", "-", False)
    home = python.parent.parent
    version = run(python, sources, "-c", "import importlib.metadata as m; print(m.version('transformers'))")
    tested = run(python, sources, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, log=home / "tests.log")
    failed = []
    for number, command in enumerate(COMMANDS, 1):
        began = time.monotonic()
        log = home / f"command-{number}.log"
        code = run(python, sources, "-m", "moe_lowering", *shlex.split(command), log=log).returncode
        print(f"torch {torch}: {command}: exit {code}, {time.monotonic() - began:.0f} s", flush=True)
        if code:
            failed.append(f"`{command}` exit {code}")
    commands = "; ".join(failed) or f"{len(COMMANDS)} exit 0"
    green = not (tested.returncode or failed)
    return Result(torch, torch_npu, version.stdout.strip(), summary(tested.stdout), commands, green)


def run(python: Path, sources: Path, *words: str, log: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a Python with the copied sources first."""
    environment = {"PYTHONPATH": str(sources), "MOE_LOWERING_SEED": os.environ.get("MOE_LOWERING_SEED", "1")}
    return run_and_log([str(python), *words], sources, environment, log)


def summary(output: str) -> str:
    """ "212 passed" or "3 failed, 209 passed", from what pytest printed last."""
    counts = re.findall(r"\d+ (?:failed|passed|errors?|skipped|xfailed|xpassed)\b", (output.splitlines() or [""])[-1])
    return ", ".join(counts) or "pytest gave no result"


def machine() -> str:
    return f"{os.cpu_count()} cores {platform.machine()}"


def updated(page: str, rows: dict[tuple[str, str], str]) -> str:
    """The page with these rows, by versions of torch and Python, in its table of results; the others as they were.

    Raises:
        ValueError: the page has no such table.
    """
    table = page.partition(START)[2].partition(END)[0]
    old = {}
    for line in table.splitlines():
        if re.match(r"\| \d", line):
            torch, python = (cell.strip() for cell in line.split("|")[1:3])
            old[torch, python] = line
    merged = {**old, **rows}
    in_order = sorted(merged, key=lambda key: [[int(n) for n in version.split(".")] for version in key])
    return replace_between(page, START, END, "\n".join(["", HEAD + "\n".join(merged[key] for key in in_order), ""]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
