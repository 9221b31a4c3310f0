"""Modules of the package that are imported when they are named, so that ``import moe_lowering`` imports no torch."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("name", ["simulator", "testing", "serving"])
def test_public_modules_load_when_they_are_named(name, tmp_path):
    code = f"import moe_lowering, sys; assert 'torch' not in sys.modules; print(moe_lowering.{name}.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (done.stdout.strip(), done.returncode) == (f"moe_lowering.{name}", 0), done.stderr[-2000:]
