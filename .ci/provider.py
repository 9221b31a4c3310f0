"""Tests the wrappers against the compiled operators of vllm-ascend's wheels, and writes the results into docs/provider.md.

    python .ci/provider.py [VERSION ...]     # make provider; without a version: 0.23.0 and the newest that has a wheel

Makes one environment (``environments``) with the torch and torch_npu that the wheels are built for, and puts each vllm-ascend,
without what it depends on, in a folder of its own there. Then runs ``provider_tests`` once for each. It needs a C compiler, nm,
readelf and the package index; no NPU, no CANN.
Ends with 1 when a test failed or none ran, 2 when an environment cannot be made.
"""

from __future__ import annotations

import ast
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from environments import PAIRS, ROOT, EnvironmentFailure, install, make_environment, replace_between, run_step

PAGE = ROOT / "docs/provider.md"
FIRST = "0.23.0"  # the last release that has both operators and a wheel
TORCH = "2.10.0"  # what the wheels of 0.23.0 and 0.26.0rc1 are pinned to
OPERATORS = ("dispatch_ffn_combine", "dispatch_gmm_combine_decode", "mega_moe")
# Column -> the tests that it counts, by file and beginning of the name.
COLUMNS = {
    "calls": "test_calls test_call",
    "metas": "test_calls test_metas",
    "graphs": "test_graphs test_",
    "wrong on purpose": "test_wrong test_",
    "library": "test_library test_",
}
BEGIN, END = "<!-- results: written by make provider -->", "<!-- end of results -->"


def main(asked: list[str]) -> int:
    try:
        python = make_environment("provider", TORCH)
        versions = list(dict.fromkeys(asked or [FIRST, newest(python)]))
        homes = {version: install_wheel(python, version) for version in versions}
    except (EnvironmentFailure, OSError) as error:
        print(f"make provider: {error}", file=sys.stderr)
        return 2
    results = {version: run_tests(python, version, homes[version]) for version in versions}
    rows = [row(version, homes[version], results[version]) for version in versions]
    write(rows, python)
    for version, (code, counts) in results.items():
        print(f"vllm-ascend {version}: {dict(counts)}, pytest ended with {code}")
    return int(not all(all_passed(*result) for result in results.values()))


def newest(python: Path) -> str:
    """The newest version of vllm-ascend that has a wheel for this Python, pre-releases too."""
    asked = ("--dry-run", "--ignore-installed", "--no-deps", "--pre", "--only-binary", ":all:", "--report", "-")
    report = json.loads(install(python, *asked, "vllm-ascend"))
    return str(report["install"][0]["metadata"]["version"])


def install_wheel(python: Path, version: str) -> Path:
    """The folder that holds one vllm-ascend, without its dependencies."""
    target = python.parent.parent / f"vllm-ascend-{version}"
    if not (target / ".ready").exists():
        options = ("--no-deps", "--upgrade", "--only-binary", ":all:", "--target", str(target))
        install(python, *options, f"vllm-ascend=={version}")
        (target / ".ready").touch()
    return target


def run_tests(python: Path, version: str, home: Path) -> tuple[int, Counter[str]]:
    """pytest's exit code, and the counts: of each column those that passed, and of all by outcome."""
    report = python.parent.parent / f"results-{version}.xml"
    report.unlink(missing_ok=True)
    paths = os.pathsep.join([str(ROOT), str(home)])
    tests = ROOT / "provider_tests"
    options = ("-q", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={tests}", f"--junitxml={report}")
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}
    done = subprocess.run([str(python), "-m", "pytest", *options, str(tests)], cwd=home, env=environment)
    counts = Counter[str]()
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        counts[outcome] += 1
        where = f"{case.get('classname', '').rpartition('.')[2]} {case.get('name')}"
        for column, prefix in COLUMNS.items():
            counts[f"{column} {'passed' if outcome == 'passed' else 'failed'}"] += where.startswith(prefix)
    return done.returncode, counts


def all_passed(code: int, counts: Counter[str]) -> bool:
    """A test that was skipped did not pass."""
    return code == 0 and counts["passed"] > 0 and not any(counts[name] for name in ("failure", "error", "skipped"))


def row(version: str, home: Path, result: tuple[int, Counter[str]]) -> str:
    code, counts = result
    [library] = home.glob("vllm_ascend/vllm_ascend_C*.so")
    content = library.read_bytes()
    there = [name for name in OPERATORS if f"{name}(Tensor".encode() in content]
    failed = counts["failure"] + counts["error"] + counts["skipped"]
    absent = [name for name in OPERATORS[:2] if name not in there]
    cells = [
        version, device(home), ", ".join(f"`{n}`" for n in there) or "none", ", ".join(f"`{n}`" for n in absent) or "none",
        *(shown(counts, column) for column in COLUMNS),
        "all passed" if all_passed(code, counts) else f"{failed} did not pass, pytest ended with {code}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def shown(counts: Counter[str], column: str) -> str:
    passed, failed = counts[f"{column} passed"], counts[f"{column} failed"]
    return f"{passed} of {passed + failed}" if failed else str(passed)


def device(home: Path) -> str:
    """The SoC that a wheel says it was built for."""
    match = re.search(r"__device_type__ = (\S+)", (home / "vllm_ascend/_build_info.py").read_text())
    return str(ast.literal_eval(match[1])) if match else "unknown"


def write(rows: list[str], python: Path) -> None:
    version = run_step(str(python), "-c", "import platform; print(platform.python_version())").strip()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, without an NPU and without CANN"
    heads = ["vllm-ascend", "built for", "has", "has not", *COLUMNS, "result"]
    lines = [
        f"{datetime.date.today().isoformat()}; {machine}; Python {version}, torch {TORCH}, torch_npu {PAIRS[TORCH]}.",
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
        *rows,
    ]
    PAGE.write_text(replace_between(PAGE.read_text("utf-8"), BEGIN, END, "\n".join(lines)), "utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
