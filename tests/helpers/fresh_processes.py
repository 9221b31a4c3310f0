"""Processes with no environment variable that torch_npu or the simulator reads."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap


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
