"""Fixtures of all tests. moe_lowering is imported before torch: see moe_lowering/_bootstrap.py."""

import moe_lowering  # noqa: F401  # isort: skip
import pytest
import torch

from moe_lowering import simulator

# Two workers on two cores: more threads only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def ascend_stack():
    """torch_npu on this machine, with an NPU or without."""
    if not simulator.is_enabled():
        simulator.enable("A3")
