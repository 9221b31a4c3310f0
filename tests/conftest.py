"""Fixtures of all tests. moe_lowering is imported before torch: see moe_lowering/_bootstrap.py."""

import moe_lowering  # noqa: F401  # isort: skip
import collections

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


def pytest_terminal_summary(terminalreporter):
    """What came of the cases of the property tests, over all chunks and workers."""
    counts = collections.defaultdict(collections.Counter)
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "outcomes":
                counts[report.nodeid.partition("[")[0]].update(value)
    for test, found in counts.items():
        shown = ", ".join(f"{count} {what}" for what, count in found.most_common())
        terminalreporter.write_line(f"{test}: {shown}")
