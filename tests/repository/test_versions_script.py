"""`make versions`: which pairs are chosen, what is read from pytest, and how the table of results is kept."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_lowering import _versions, testing
from moe_lowering.vocabulary import PROVIDER_VERSIONS

CI = Path(__file__).resolve().parents[2] / ".ci"


sys.path.insert(0, str(CI))  # the scripts import one another, as they do when one is run
versions, standins, environments = map(importlib.import_module, ("versions", "cuda_standins", "environments"))


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        ([], list(versions.PAIRS)),
        (["2.14", "2.10"], ["2.10.0", "2.14.0"]),
        (["2.12.0", "2.12"], ["2.12.0"]),
    ],
)
def test_pairs_are_selected_in_order(words, chosen):
    assert versions.select(words) == chosen


@pytest.mark.parametrize("word", ["2.9", "2.1", "2.100", "", "2.10.0.post4"])
def test_an_unknown_pair_is_refused_before_anything_is_done(word, capsys):
    assert versions.main(["2.10", word]) == 2
    said = capsys.readouterr().err
    assert f"unknown version {word!r}; accepted: 2.10, 2.11, 2.12, 2.13, 2.14" in said


def test_what_counts_as_tested_was_green():
    """Each pair that no warning is given for has a row of the results that `make versions` wrote, and nothing failed in it."""
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in versions.PAGE.read_text().splitlines()]
    rows = [row for row in rows if len(row) == 7 and row[0] in versions.PAIRS and row[2] == versions.PAIRS[row[0]]]
    green = {(torch, npu) for torch, _, npu, _, tests, commands, _ in rows if is_green(tests, commands)}
    pairs = {(torch.rpartition(".")[0], ".".join(npu.split(".")[:3])) for torch, npu in green}
    assert pairs == {*_versions.TESTED} and len(pairs) == len(_versions.TESTED)


def is_green(tests: str, commands: str) -> bool:
    return re.fullmatch(r"[1-9]\d* passed", tests) is not None and commands == f"{len(versions.COMMANDS)} exit 0"


@pytest.mark.parametrize(
    "row", [("1 failed, 9 passed", "8 exit 0"), ("9 passed", "`lower` exit 1"), ("0 passed", "8 exit 0")]
)
def test_a_row_with_a_failure_is_not_green(row):
    assert not is_green(*row)


def test_the_selected_tests_are_there():
    assert [name for name in versions.TESTS if not (CI.parent / name).is_file()] == []


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("...\n3 failed, 209 passed, 1 warning in 90.27s (0:01:30)\n", "3 failed, 209 passed"),
        ("1 error in 0.1s", "1 error"),
        ("", "pytest gave no result"),
        ("Segmentation fault", "pytest gave no result"),
    ],
)
def test_counts_are_read_from_the_last_line(output, said):
    assert versions.summary(output) == said


def test_a_command_that_hangs_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(environments, "TIMEOUT", 1)
    hang = [sys.executable, "-u", "-c", "import time; print('begun'); time.sleep(60)"]
    done = environments.run_and_log(hang, tmp_path, {}, tmp_path / "log")
    assert done.returncode == 124 and done.stdout == "begun\n\nno end after 1 s" == (tmp_path / "log").read_text()
    assert environments.run_and_log([sys.executable, "-c", "print(1)"], tmp_path, {}).returncode == 0


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """The commands that would make an environment; the one that ``fails`` names is refused as by pip."""
    ran: list[str] = []

    def run_step(*command: str) -> str:
        ran.append(" ".join(command))
        if run_step.fails in ran[-1]:
            raise environments.EnvironmentFailure(f"{ran[-1]} ended with 1:\nno matching distribution")
        (tmp_path / "e/lib/python3/site-packages/torch/lib").mkdir(parents=True, exist_ok=True)
        return ""

    run_step.fails = "nothing"
    monkeypatch.setenv("MOE_LOWERING_VENVS", str(tmp_path))
    monkeypatch.setattr(environments, "run_step", run_step)
    return run_step, ran


def test_an_environment_is_kept_while_its_packages_are_the_same(steps):
    _, ran = steps
    python = environments.make_environment("e", "2.10.0", ["transformers"])
    made = len(ran)
    assert made == 3 and python == environments.make_environment("e", "2.10.0", ["transformers"]) and len(ran) == made
    environments.make_environment("e", "2.11.0", ["transformers"])
    environments.make_environment("e", "2.11.0")
    assert len(ran) == 3 * made


def test_a_half_made_environment_is_not_taken_for_a_complete_one(steps):
    run_step, ran = steps
    run_step.fails = "sympy"
    for attempt in (1, 2):
        with pytest.raises(environments.EnvironmentFailure, match="no matching distribution"):
            environments.make_environment("e", "2.10.0")
        assert len(ran) == 3 * attempt


def test_a_pair_that_cannot_be_installed_is_named_with_the_reason(steps):
    run_step, _ = steps
    run_step.fails = "torch-npu"
    result = versions.check("2.12.0", "2.12.0.post3")
    assert not result.green and "not installed: no matching distribution" in result.row()


def test_what_is_run_is_a_copy_of_the_sources(tmp_path):
    (tmp_path / "a/left.txt").mkdir(parents=True)
    copied = environments.copy_sources(tmp_path / "a")
    names = {path.relative_to(copied).as_posix() for path in copied.rglob("*") if path.is_file()}
    assert {"moe_lowering/__init__.py", ".ci/versions.py", "tests/passes/test_fake_values.py"} <= names
    assert not any(name.startswith((".git/", ".venv")) for name in names) and not (copied / "left.txt").exists()


def test_rows_that_were_not_run_stay():
    page = f"a\n{versions.START}\n{versions.END}\nb\n"
    rows = {key: f"| {' | '.join(key)} | old |" for key in [("2.14.0", "3.11"), ("2.9.0", "3.13"), ("2.9.0", "3.9")]}
    for key, row in rows.items():
        page = versions.updated(page, {key: row})
    page = versions.updated(page, {("2.14.0", "3.11"): "| 2.14.0 | 3.11 | new |"})
    table = "| 2.9.0 | 3.9 | old |\n| 2.9.0 | 3.13 | old |\n| 2.14.0 | 3.11 | new |\n"
    assert page == f"a\n{versions.START}\n\n{versions.HEAD}{table}\n{versions.END}\nb\n"


def test_a_page_without_the_table_is_refused():
    with pytest.raises(ValueError, match="has no"):
        versions.updated("nothing", {("2.10.0", "3.11"): ""})


def _torch_of_c(tmp_path: Path, cuda: str) -> Path:
    """A directory that looks like a CUDA build: a library that needs libtorch_cuda.so and libcudart.so.12."""
    torch = tmp_path / "torch"
    lib = torch / "lib"
    lib.mkdir(parents=True)
    (torch / "version.py").write_text(f"cuda: str | None = {cuda!r}\n")
    (torch / "backends/cuda").mkdir(parents=True)
    (torch / "backends/cuda/__init__.py").write_text("def is_built():\n    return torch._C._has_cuda\n")
    (torch / "cuda").mkdir()
    (torch / "cuda/graphs.py").write_text("def is_capturing():\n    return _cuda_isCurrentStreamCapturing()\n")
    (tmp_path / "torch-2.11.0.dist-info").mkdir()
    (tmp_path / "torch-2.11.0.dist-info/METADATA").write_text("Requires-Dist: sympy\nRequires-Dist: nvidia-cublas==1\n")
    sources = {
        "libcudart.so.12": "int cudaMalloc(void) { return 0; }",
        "libtorch_cuda.so": "int cudaMalloc(void); int state[5]; int _ZN1aEv(void) { return cudaMalloc(); }",
        "libtorch_python.so": "int cudaMalloc(void); int _ZN1aEv(void); extern int state[5];"
        "int ask(void) { return state[4] + cudaMalloc(); } int call(void) { return _ZN1aEv(); }",
    }
    needs: list[str] = []
    for name, source in sources.items():
        (tmp_path / "a.c").write_text(source)
        (tmp_path / "a.map").write_text(f"{name} {{ *; }};" if name.endswith("12") else "{ global: *; };")
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-Wl,--no-as-needed", f"-Wl,-soname,{name}", "-Wl,-rpath,$ORIGIN",
             f"-Wl,--version-script={tmp_path / 'a.map'}", "-o", lib / name, tmp_path / "a.c", f"-L{lib}", *needs],
            check=True,
        )  # fmt: skip
        needs.append(f"-l:{name}")
    (lib / "libcudart.so.12").unlink()  # the package that has it is not installed
    return torch


def test_libraries_of_cuda_are_replaced(tmp_path):
    torch = _torch_of_c(tmp_path, "12.8")
    load = [sys.executable, "-c", "import ctypes, sys; print(ctypes.CDLL(sys.argv[1], 2).ask())"]
    library = str(torch / "lib/libtorch_python.so")
    assert subprocess.run([*load, library], capture_output=True).returncode != 0
    assert standins.replace_libraries(torch) == ["libcudart.so.12", "libtorch_cuda.so"]
    assert subprocess.run([*load, library], capture_output=True, text=True).stdout == "100\n"  # cudaErrorNoDevice
    abort = subprocess.run(
        [sys.executable, "-c", f"import ctypes; ctypes.CDLL({library!r}).call()"], capture_output=True
    )
    assert abort.returncode == -6 and b"CUDA stand-in: _ZN1aEv was called" in abort.stderr
    assert (torch / "version.py").read_text() == "cuda: str | None = None\n"
    assert "return False" in (torch / "backends/cuda/__init__.py").read_text()
    assert "return False" in (torch / "cuda/graphs.py").read_text()
    assert (tmp_path / "torch-2.11.0.dist-info/METADATA").read_text() == "Requires-Dist: sympy\n"
    assert standins.replace_libraries(torch) == []


def test_a_cpu_build_is_left_alone(tmp_path):
    (tmp_path / "torch/lib").mkdir(parents=True)
    assert standins.replace_libraries(tmp_path / "torch") == []


def test_a_fake_deployment_declares_versions_that_go_together():
    """vllm-ascend's wheels are of torch 2.10 (docs/install.md)."""
    with testing.fake_deployment() as deployment:
        assert deployment.providers == (("vllm_ascend", PROVIDER_VERSIONS["vllm_ascend"][0]),)
        assert deployment.torch_npu == environments.PAIRS["2.10.0"]
    assert f"| 2.10.0 | {deployment.torch_npu}:" in (CI.parent / "docs" / "install.md").read_text()
