"""How the simulator's libraries are built, kept and loaded, and what is said where that fails.

What needs a fresh process runs in one, with no environment variable that torch_npu or the simulator reads.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
from fresh_processes import finish, start

from moe_lowering import _bootstrap, _versions, simulator
from moe_lowering.simulator import SimulatorError, standins, state


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """This process as it was before ``enable()``, with an empty cache and no CANN. The cache is returned."""
    monkeypatch.setattr(state, "enabled", False)
    monkeypatch.setattr(state, "loaded", None)
    monkeypatch.setattr(_bootstrap, "cann_is_installed", lambda: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moe_lowering" / "standins"


def tools(folder: Path, *names: str) -> str:
    """A PATH that holds these programs and nothing else."""
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(shutil.which(name))
    return str(folder)


# Building


def test_built_once_and_again_when_a_source_or_version_changes(fresh, monkeypatch, tmp_path):
    first = standins.build_libraries()
    assert {path.name for path in first.glob("*.so")} == {f"lib{name}.so" for name in standins.LIBRARIES}

    real = standins.run_tool
    monkeypatch.setattr(standins, "run_tool", lambda *command: pytest.fail(f"built again: {command}"))
    assert standins.build_libraries() == first
    monkeypatch.setattr(standins, "run_tool", real)

    changed = tmp_path / "runtime.c"
    runtime, capture = standins.SOURCES
    changed.write_text(runtime.read_text() + "/* changed */\n")
    monkeypatch.setattr(standins, "SOURCES", (changed, capture))
    second = standins.build_libraries()
    monkeypatch.setattr(_versions, "installed_version", lambda name: "9.9")
    third = standins.build_key()
    header = tmp_path / "standin.h"
    header.write_text(standins.HEADER.read_text() + "/* changed */\n")
    monkeypatch.setattr(standins, "HEADER", header)
    assert len({first.name, second.name, third, standins.build_key()}) == 4
    assert sorted(path.name for path in fresh.iterdir()) == sorted([first.name, second.name])


def test_two_processes_build_at_once(tmp_path):
    """Both start to compile (neither sees the other's result) before either is done, and both can load it."""
    script = """
        import time
        from pathlib import Path
        from moe_lowering.simulator import SimulatorError, standins

        build, here = standins._build, Path({here!r})

        def together(*arguments):
            (here / {name!r}).touch()
            while len(list(here.iterdir())) < 2:
                time.sleep(0.01)
            build(*arguments)

        standins._build = together
        standins.load(standins.build_libraries(), "Ascend910B3")
        """
    (tmp_path / "here").mkdir()
    cache = str(tmp_path / "cache")
    processes = [start(script.format(here=str(tmp_path / "here"), name=name), XDG_CACHE_HOME=cache) for name in "ab"]
    for process in processes:
        finish(process)
    (only,) = (tmp_path / "cache/moe_lowering/standins").iterdir()
    assert only.name == standins.build_key()


def test_generated_functions_are_cann_only(fresh):
    """A stand-in for dlopen, which the wheel leaves unversioned, would shadow the real one."""
    nm = shutil.which("nm")
    expected = standins._undefined_symbols(nm, standins.wheel())
    undefined = standins.read_symbols(nm, standins.wheel() / "lib/libtorch_npu.so", "-D", "--undefined-only")
    assert "dlopen" in undefined and "dlopen" not in expected
    assert {"aclrtMalloc", "_ZN2ge10GEFinalizeEv"} <= expected
    source = standins.generate_functions(["aclX", "_ZN2ge1YEv"])
    assert 'int aclX(void) { return moe_standin_unsupported("aclX"); }' in source
    assert 'void _ZN2ge1YEv(void) { moe_standin_abort("_ZN2ge1YEv"); }' in source


# Errors


def test_missing_compiler_is_named(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", tools(tmp_path / "bin", "nm"))
    with pytest.raises(SimulatorError, match=r"C compiler \(cc or gcc or clang\) is not on PATH.*install gcc"):
        simulator.enable()
    assert not simulator.is_enabled() and state.loaded is None


def test_missing_nm_is_named(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", tools(tmp_path / "bin", "gcc"))
    with pytest.raises(SimulatorError, match=r"nm \(nm\) is not on PATH.*install binutils"):
        simulator.enable()


def test_compiler_error_is_shown_and_leaves_nothing(fresh, monkeypatch, tmp_path):
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", tools(tmp_path / "bin", "nm"))
    failing = tmp_path / "bin" / "cc"
    failing.write_text("#!/bin/sh\necho no space left on the moon >&2\nexit 3\n")
    failing.chmod(0o755)
    with pytest.raises(SimulatorError, match=r"ended with 3:\nno space left on the moon"):
        simulator.enable()
    assert list(fresh.iterdir()) == []
    monkeypatch.setenv("PATH", path)
    assert standins.build_libraries().is_dir()


def test_cache_that_cannot_be_written_is_named(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(SimulatorError, match="set XDG_CACHE_HOME to a writable place"):
        simulator.enable()


def test_library_that_does_not_load_is_named(tmp_path):
    (tmp_path / "libascendcl.so").write_text("not a library")
    with pytest.raises(SimulatorError, match="delete that directory to rebuild"):
        standins.load(tmp_path, "Ascend910B3")


@pytest.mark.parametrize(("module", "package"), [("torch_npu", "torch-npu"), ("packaging", "packaging")])
def test_missing_package_is_named(fresh, monkeypatch, module, package):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else real(name, *rest))
    with pytest.raises(SimulatorError, match=rf"^{package} is not installed.*pip install 'moe-lowering\[npu\]'"):
        simulator.enable()
    assert not fresh.exists()


def test_cann_is_not_shadowed(fresh, monkeypatch):
    monkeypatch.setattr(_bootstrap, "cann_is_installed", lambda: True)
    with pytest.raises(SimulatorError, match="this machine has CANN"):
        simulator.enable()
    assert not simulator.is_enabled() and not fresh.exists()


def test_unknown_soc_is_refused(fresh):
    with pytest.raises(SimulatorError, match="unknown SoC 'A4'; accepted: A2, A3, A5, 310P"):
        simulator.enable("A4")
