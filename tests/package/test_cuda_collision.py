"""torch_npu 2.11 to 2.14 aborts its process beside a CUDA build of torch: it is not imported there, and the message helps."""

import re
import sys

import pytest
import torch

from moe_lowering import Deployment, _bootstrap, _versions, cli, simulator, torchair_config
from moe_lowering.integrations import transformers as integration
from moe_lowering.simulator import SimulatorError, standins, state

CUDA = ("2.13.0+cu130", "13.0")
CPU = "install the CPU build: pip install torch==2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu"


def versions(monkeypatch, torch_npu, build):
    """As in a process that has not imported torch_npu."""
    monkeypatch.setattr(_versions, "torch_build", lambda: build)
    installed = {"torch": build[0], "torch_npu": torch_npu}
    monkeypatch.setattr(_versions, "installed_version", lambda name: installed.get(name, ""))
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)


@pytest.mark.parametrize("torch_npu", ["2.11.0.post2", "2.12.0.post3", "2.13.0", "2.14.0"])
def test_a_cuda_build_collides(monkeypatch, torch_npu):
    versions(monkeypatch, torch_npu, CUDA)
    assert _versions.cuda_collision() == (
        f"torch 2.13.0+cu130 is a CUDA build (CUDA 13.0), beside which torch_npu {torch_npu} aborts the process; {CPU}"
    )


@pytest.mark.parametrize(
    "torch_npu, build",
    [
        ("2.10.0.post4", CUDA),
        ("2.15.0", CUDA),
        ("", CUDA),
        ("2.13.0", ("2.13.0+cpu", None)),
        ("2.13.0", ("2.13.0", None)),
    ],
)
def test_other_builds_do_not_collide(monkeypatch, torch_npu, build):
    versions(monkeypatch, torch_npu, build)
    assert _versions.cuda_collision() == ""


def test_a_process_that_has_imported_torch_npu_lives(monkeypatch):
    versions(monkeypatch, "2.13.0", CUDA)
    monkeypatch.setitem(sys.modules, "torch_npu", object())
    assert _versions.cuda_collision() == ""


def test_the_build_is_the_imported_one():
    assert _versions.torch_build() == (torch.__version__, torch.version.cuda)


def test_a_cuda_build_is_refused_before_anything_is_loaded(monkeypatch, capsys):
    versions(monkeypatch, "2.13.0", CUDA)
    monkeypatch.setattr(state, "enabled", False)
    monkeypatch.setattr(state, "loaded", None)
    monkeypatch.setattr(_bootstrap, "cann_is_installed", lambda: False)
    monkeypatch.setattr(standins, "build_libraries", lambda: pytest.fail("the simulator goes on"))
    with pytest.raises(SimulatorError, match=re.escape(CPU)):
        simulator.enable("A3")
    assert cli.main(["lower", "moe"]) == cli.main(["matrix"]) == 2
    for line in capsys.readouterr().err.splitlines():
        assert line.endswith(CPU) or "enabling the simulator" in line, line


@pytest.mark.parametrize(
    "call", [integration.register, lambda: torchair_config(Deployment(mode="ge"))], ids=["transformers", "torchair"]
)
def test_a_cuda_build_is_refused_by_what_imports_torch_npu(call, monkeypatch):
    versions(monkeypatch, "2.13.0", CUDA)
    with pytest.raises(ImportError, match=re.escape(CPU)):
        call()
