"""The simulator's libraries: how they are built and loaded, what they refuse, and that npugraph_ex runs on them.

What needs a fresh process runs in one, with no environment variable that torch_npu or the simulator reads.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
from rank_pools import Ranks

from moe_lowering import Deployment, MoeLowering, _bootstrap, _versions, simulator
from moe_lowering.simulator import SimulatorError, standins, state

FORCE_EAGER = {"force_eager": True}


def start(script: str, **environment: str) -> subprocess.Popen[str]:
    """A fresh Python that runs ``script``."""
    cleared = ("TORCH_DEVICE_BACKEND_AUTOLOAD", "TASK_QUEUE_ENABLE", "ASCEND_HOME_PATH", "LD_LIBRARY_PATH")
    kept = {name: value for name, value in os.environ.items() if name not in cleared}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.Popen(
        command, env={**kept, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it printed; it must end well."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


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


# Enabling


@pytest.mark.parametrize(
    ("soc", "first", "name", "number"),
    [  # the numbers are torch_npu's SocVersion
        ("A2", "moe_lowering", "Ascend910B3", 223),
        ("A3", "torch", "Ascend910_9391", 250),
        ("A5", "moe_lowering", "Ascend950DT_9591", 260),
        ("310P", "torch", "Ascend310P3", 202),
    ],
)
def test_enable_gives_torch_npu_the_soc(soc, first, name, number):
    """Before ``import torch`` and after it (then moe_lowering comes first, which turns the autoload off)."""
    process = start(f"""
        import sys
        import moe_lowering.simulator as simulator
        assert "torch_npu" not in sys.modules and not simulator.is_enabled()
        if {first!r} == "torch":
            import torch
        simulator.enable({soc!r})
        simulator.enable({soc!r})
        import torch, torch_npu
        from torch_npu.npu._backends import get_soc_version
        try:
            simulator.enable("A2" if {soc!r} == "A3" else "A3")
        except simulator.SimulatorError as error:
            print(error)
        print(simulator.soc(), simulator.is_enabled(), torch.npu.get_device_name(0), get_soc_version())
        """)
    out, err = finish(process)
    refused, state = out.splitlines()  # nothing else is printed: the warning about ASCEND_HOME_PATH is held back
    assert state == f"{soc} True {name} {number}"
    assert f"simulates {soc} and cannot change to {'A2' if soc == 'A3' else 'A3'}" in refused
    assert err == ""


def test_without_the_simulator_torch_npu_does_not_import():
    """The twin of the test above: what it shows is due to ``enable()``."""
    process = start("import moe_lowering, torch_npu")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "libhccl.so" in err or "libascendcl.so" in err


def test_enable_can_be_repeated_after_an_error():
    """The libraries are loaded by then: they must not be taken for CANN. Children of the process can import torch."""
    process = start("""
        import subprocess, sys
        import moe_lowering.simulator as simulator
        register, simulator._register_kernels = simulator._register_kernels, lambda: 1 / 0
        try:
            simulator.enable()
        except ZeroDivisionError:
            print(simulator.is_enabled())
        try:
            simulator.soc()
        except simulator.SimulatorError as error:
            print(error)
        simulator._register_kernels = register
        simulator.enable()
        print(simulator.is_enabled(), subprocess.run([sys.executable, "-c", "import torch"]).returncode)
        """)
    before, soc, after = finish(process)[0].splitlines()
    assert (before, after) == ("False", "True 0")
    assert "not enabled in this process" in soc


def test_what_is_not_simulated_fails_by_name():
    """Device memory works; an operator on it must raise where it is called, not give what was in memory."""
    process = start("""
        import moe_lowering.simulator
        moe_lowering.simulator.enable()
        import torch
        x = torch.arange(12.).reshape(3, 4)
        on_npu = x.npu()
        assert on_npu.device.type == "npu" and torch.equal(on_npu.cpu(), x)
        event = torch.npu.Event()
        event.record(torch.npu.Stream())
        event.synchronize()
        for operation in (lambda: on_npu + 1, lambda: on_npu.to(torch.bfloat16), lambda: on_npu.t().contiguous()):
            try:
                operation()
            except RuntimeError as error:
                print("aclopCompileAndExecute is not simulated" in str(error), "enable_device() in its place" in str(error))
        try:
            torch.compile(torch.nn.functional.silu, backend="npugraph_ex")(x)
        except RuntimeError as error:
            print('options={"force_eager": True}' in str(error) and "enable_device() in place of enable()" in str(error))
        moe_lowering.simulator.enable_device()  # the way out that the errors name: it computes
        print((on_npu + 1).sum().item() == 78)
        for operation in (lambda: torch.ops.npu.npu_fast_gelu(on_npu), lambda: x.to("npu:1")):
            try:
                operation()
            except RuntimeError as error:
                print("aclopCompileAndExecute is not simulated" in str(error), "enable_device()" in str(error))
                print("there is no device npu:1; accepted: npu:0 to npu:0" in str(error))
        """)
    said = finish(process)[0].split()
    assert said == ["True"] * 8 + ["True", "False", "False"] + ["False", "False", "True"]


# npugraph_ex


def test_npugraph_ex_compiles_for_cpu():
    """Static and dynamic, collectives of a fake group included; the hook sees the graph; numbers are eager's."""
    process = start("""
        import moe_lowering.simulator
        moe_lowering.simulator.enable()
        import torch, torch.distributed as dist
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
        group, c10d = dist.group.WORLD.group_name, torch.ops._c10d_functional

        def function(x, w):
            y = torch.nn.functional.silu(x @ w)
            gathered = c10d.wait_tensor(c10d.all_gather_into_tensor(y, 4, group))
            return c10d.wait_tensor(c10d.reduce_scatter_tensor(gathered + 1, "sum", 4, group)) * 2

        for dynamic in (False, True):
            torch._dynamo.reset()
            graphs = []
            options = {"force_eager": True, "post_grad_custom_pre_pass": lambda gm, inputs, config: graphs.append(gm)}
            compiled = torch.compile(function, backend="npugraph_ex", options=options, dynamic=dynamic, fullgraph=True)
            for tokens in (4, 8, 12):
                x, w = torch.randn(tokens, 16), torch.randn(16, 16)
                torch.testing.assert_close(compiled(x, w), function(x, w), rtol=0, atol=0)
            targets = {str(node.target) for node in graphs[0].graph.nodes}
            assert "_c10d_functional.all_gather_into_tensor.default" in targets, targets
            assert "_c10d_functional.reduce_scatter_tensor.default" in targets, targets
            print(len(graphs))
        """)
    assert finish(process)[0].split() == ["3", "1"]


def gather_and_scatter(rank: int) -> tuple[list[float], list[float]]:
    import torch
    import torch.distributed as dist

    group, c10d = dist.group.WORLD.group_name, torch.ops._c10d_functional

    def function(x: torch.Tensor) -> torch.Tensor:
        gathered = c10d.wait_tensor(c10d.all_gather_into_tensor(x * 2, 2, group))
        return c10d.wait_tensor(c10d.reduce_scatter_tensor(gathered + rank, "sum", 2, group))

    compiled = torch.compile(function, backend="npugraph_ex", options=FORCE_EAGER, fullgraph=True)
    x = torch.tensor([1.0, 2.0]) + 10 * rank
    return compiled(x).tolist(), function(x).tolist()


def test_npugraph_ex_runs_collectives_of_a_gloo_group():
    """Rank r receives its own 2x from both ranks, plus 0 and 1."""
    with Ranks(2, setup=simulator.enable) as ranks:
        results = ranks.run(gather_and_scatter)
    assert results[0] == ([5.0, 9.0], [5.0, 9.0])
    assert results[1] == ([45.0, 49.0], [45.0, 49.0])


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


# Versions


def test_untested_versions_warn_once(monkeypatch):
    monkeypatch.setattr(_versions, "_warned", False)
    monkeypatch.setattr(_versions, "installed_version", {"torch": "2.130.0", "torch_npu": "2.9.0.post4"}.__getitem__)
    with pytest.warns(RuntimeWarning) as caught:
        MoeLowering(Deployment())  # wherever the pass runs: each way makes one
        MoeLowering(Deployment())
    assert [str(warning.message) for warning in caught] == [
        "moe_lowering was not tested with torch 2.130.0 and torch_npu 2.9.0.post4 "
        "(tested: 2.10 with 2.10.0, 2.11 with 2.11.0, 2.12 with 2.12.0, 2.13 with 2.13.0, 2.14 with 2.14.0)"
    ]


@pytest.mark.parametrize(
    ("torch", "torch_npu", "said"),
    [
        ("2.13.0", "2.14.0", "torch 2.13.0 and torch_npu 2.14.0 ("),  # each tested, not together
        ("2.14.0", "2.14.1", "torch 2.14.0 and torch_npu 2.14.1 ("),
        ("2.15.0", "", "torch 2.15.0 (tested"),
        ("2.1.0", "", "torch 2.1.0 (tested"),
    ],
)
def test_a_pair_that_was_not_tested_is_named(monkeypatch, torch, torch_npu, said):
    monkeypatch.setattr(_versions, "installed_version", {"torch": torch, "torch_npu": torch_npu}.__getitem__)
    assert _versions.describe_untested_pair().startswith(said)


INSTALLED = [(f"{torch}.0{build}", npu) for torch, npu in _versions.TESTED for build in ("", "+cpu")]


@pytest.mark.parametrize(("torch", "torch_npu"), [*INSTALLED, ("2.13.0", "2.13.0.post1"), ("2.10.0+cpu", "")])
def test_tested_versions_do_not_warn(monkeypatch, torch, torch_npu):
    monkeypatch.setattr(_versions, "_warned", False)
    monkeypatch.setattr(_versions, "installed_version", {"torch": torch, "torch_npu": torch_npu}.__getitem__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _versions.warn_if_untested()
