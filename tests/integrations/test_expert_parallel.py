"""transformers' native expert parallelism with the implementation ``moe_lowering``, on two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_lowering.integrations import expert_parallel


def test_transformers_loads_shards_and_is_lowered(tmp_path):
    helper = Path(__file__).parents[1] / "helpers" / "expert_parallel_process.py"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        str(helper),
        str(tmp_path / "model"),
    ]
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert result["experts"] == [4, 64, 64] and result["sizes"] == [2, 2]
    assert result["eager"] < 1e-5 and result["lowered"] < 1e-5
    assert result["blocks"] == ["allgather"]
    assert result["without its experts"] > 1e-3


def test_a_model_that_was_not_loaded_so():
    with pytest.raises(ValueError, match="deployment_of: Linear has no experts of this EP implementation"):
        expert_parallel.deployment_of(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("bound", [0, True, "many", None])
def test_a_bound_is_needed(bound):
    with pytest.raises(ValueError, match=r"max_tokens is .*; accepted: an int, 1 or more"):
        expert_parallel.register_expert_parallelism(bound)
