"""``moe-lowering simulate``: a program and what it starts find the simulator; nothing else of them changes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_lowering import cli, simulator
from moe_lowering._bootstrap import AUTOLOAD
from moe_lowering.simulator import SimulatorError, imports

PARENT = """
import subprocess, sys
print("torch" in sys.modules, "mine" in sys.modules)
code = '''
import torch, torch_npu, acl
torch.npu.set_device(1)
x = torch.arange(4.0).npu()
print((x * 2).sum().item(), x.device, torch.npu.device_count(), acl.get_soc_name())
'''
print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
sys.exit(7)
"""


def test_a_program_and_its_children(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "sitecustomize.py").write_text("import mine\n")  # somebody else's is read too
    path = os.pathsep.join([str(Path(cli.__file__).parents[2]), str(tmp_path)])
    command = [
        sys.executable,
        "-m",
        "moe_lowering",
        "simulate",
        "--soc",
        "910b",
        "--devices",
        "2",
        "--",
        sys.executable,
    ]
    done = subprocess.run(
        [*command, str(tmp_path / "parent.py")], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout.split("\n")[:2] == ["False True", "12.0 npu:1 2 Ascend910B3"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "argument PROGRAM: is missing; accepted: a program after --"),
        (["--soc", "A9", "--", "x"], "argument --soc: is 'A9'; accepted: A2 (910B), A3 ("),
        (["--devices", "0", "--", "x"], "argument --devices: is '0'; accepted: an integer from 1"),
        (
            ["python", "-c", "x"],
            "argument -c: is no option of simulate; accepted: those of moe-lowering simulate --help, and the pro",
        ),
        (
            ["--", "no-such-program-at-all"],
            "no-such-program-at-all cannot be started (No such file or directory); accepted: a program on PATH",
        ),
    ],
)
def test_wrong_usage(arguments, says, capsys):
    assert cli.main(["simulate", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_the_environment_keeps_what_was_there():
    made = imports.environment("A3", {"PYTHONPATH": "/a:/b", "OTHER": "x"}, devices=2)
    assert made["PYTHONPATH"].split(":")[1:] == ["/a", "/b"] and made["OTHER"] == "x"
    assert (made["MOE_LOWERING_SIMULATOR"], made["MOE_LOWERING_SIMULATOR_DEVICES"]) == ("A3", "2")
    assert imports.environment("A3", made, devices=2) == made  # once more changes nothing
    with pytest.raises(SimulatorError, match="MOE_LOWERING_SIMULATOR is 'A4'; accepted: A2, A3"):
        imports.environment("A4", {})


@pytest.mark.parametrize(("simulated", "left"), [("A3", "1"), (None, "0")])
def test_ranks_of_torchrun_find_the_autoload_as_the_command_was_told(monkeypatch, simulated, left):
    """torchrun imports torch, and with it the simulator, before it starts the ranks."""
    monkeypatch.setenv(AUTOLOAD, "1")
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "1")
    monkeypatch.delenv(imports.VARIABLE, raising=False)
    if simulated:
        monkeypatch.setenv(imports.VARIABLE, simulated)
    simulator._set_environment()
    assert os.environ[AUTOLOAD] == left
