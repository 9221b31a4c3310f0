"""torchair's GE mode in processes of its own: beside npugraph_ex, in either order, and ended by a signal."""

import subprocess
import sys

import pytest

BOTH = """
import torch
from moe_lowering import MoE, npugraph_ex_options, simulator
from moe_lowering.testing.graphs import fake_deployment

simulator.enable()
from moe_lowering.testing.ge import convert


def layer():
    return MoE(1024, 512, 4, 2, dtype=torch.bfloat16).eval().requires_grad_(False)


def captured(deployment):
    options = npugraph_ex_options(deployment, comm="allgather", force_eager=True)
    with torch.no_grad():
        torch.compile(layer(), backend="npugraph_ex", options=options)(torch.randn(8, 1024, dtype=torch.bfloat16))


def converted(deployment):
    x = torch.randn(8, 1024, dtype=torch.bfloat16).to("npu")
    graph = convert(layer().to("npu"), (x,), deployment, comm="allgather")
    assert graph.of_type("GroupedMatmul"), graph.types()


with fake_deployment(ep_size=1) as deployment:
    for compile in {order}:
        compile(deployment)
print("compiled")
"""


@pytest.mark.parametrize("order", ["(captured, converted)", "(converted, captured)"])
def test_both_backends_in_one_process(order):
    """npugraph_ex and torchair register the same things with torch: they may do so in either order."""
    ended = subprocess.run(
        [sys.executable, "-c", BOTH.format(order=order)], capture_output=True, text=True, timeout=300
    )
    assert ended.stdout.endswith("compiled\n"), ended.stderr[-2000:]


INTERRUPTED = """
import os, signal
import torch
from moe_lowering import MoE, simulator
from moe_lowering.testing.graphs import fake_deployment

simulator.enable()
from moe_lowering.testing import ge
import torchair
from torchair.core import _backend

x = torch.randn(8, 1024, dtype=torch.bfloat16).to("npu")


def convert(number):
    config = torchair.CompilerConfig()
    config.post_grad_custom_post_pass = lambda *_: os.kill(os.getpid(), number)
    with fake_deployment(ep_size=1) as deployment:
        model = MoE(1024, 512, 4, 2, dtype=torch.bfloat16).eval().requires_grad_(False).to("npu")
        return ge.convert(model, (x,), deployment, comm="allgather", config=config)


installed = signal.getsignal(signal.SIGINT)
assert installed.__name__ == "_signal_handler", installed
try:
    convert(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
assert signal.getsignal(signal.SIGINT) is installed
seen = []
signal.signal(signal.SIGINT, lambda *given: seen.append(given))  # somebody else's
assert convert(signal.SIGINT).of_type("GroupedMatmul")
print("called", len(seen), flush=True)
convert(signal.SIGTERM)
print("survived")
"""


def test_a_signal_ends_a_conversion():
    """torchair's handlers would reset dynamo while it compiles, and ignore the signal (interrupts)."""
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=300)
    assert ended.stdout == "interrupted\ncalled 1\n", ended.stderr[-2000:]
    assert ended.returncode == 143
