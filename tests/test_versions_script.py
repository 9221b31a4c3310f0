"""`make versions`: which pairs are chosen, what is read from pytest, and how the table of results is kept."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from moe_lowering import _versions

CI = Path(__file__).resolve().parent.parent / ".ci"


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"ci_{name}", CI / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # NamedTuple looks its module up
    spec.loader.exec_module(module)
    return module


versions, standins = _module("versions"), _module("cuda_standins")


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


def test_what_counts_as_tested_can_be_run():
    run = zip(versions.PAIRS, versions.PAIRS.values(), strict=True)
    pairs = [(torch.rpartition(".")[0], ".".join(npu.split(".")[:3])) for torch, npu in run]
    tested = list(zip(_versions.TESTED["torch"], _versions.TESTED["torch_npu"], strict=True))
    assert tested and [pair for pair in pairs if pair in tested] == tested


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
    monkeypatch.setattr(versions, "TIMEOUT", 1)
    done = versions.run(sys.executable, "-u", "-c", "import time; print('begun'); time.sleep(60)", log=tmp_path / "log")
    assert done.returncode == 124 and done.stdout == "begun\n\nno end after 1 s" == (tmp_path / "log").read_text()
    assert versions.run(sys.executable, "-c", "print(1)").returncode == 0


def test_rows_that_were_not_run_stay():
    page = f"a\n{versions.START}\n{versions.END}\nb\n"
    page = versions.updated(page, {"2.14.0": "| 2.14.0 | old |"})
    page = versions.updated(page, {"2.10.0": "| 2.10.0 | new |"})
    assert page == f"a\n{versions.START}\n\n{versions.HEAD}| 2.10.0 | new |\n| 2.14.0 | old |\n\n{versions.END}\nb\n"


def test_a_page_without_the_table_is_refused():
    with pytest.raises(ValueError, match="has no"):
        versions.updated("nothing", {"2.10.0": ""})


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
