"""A replacement that does not have the shape, dtype and device of what it stands for is refused (``verifier.same_value``)."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from moe_lowering.passes.verifier import VerificationError, same_value

MADE = {
    "equal": ((4, 6), torch.float32, "cpu"),
    "another size": ((4, 5), torch.float32, "cpu"),
    "swapped": ((6, 4), torch.float32, "cpu"),
    "an axis more": ((4, 6, 1), torch.float32, "cpu"),
    "another dtype": ((4, 6), torch.bfloat16, "cpu"),
    "another device": ((4, 6), torch.float32, "meta"),
}


@pytest.mark.parametrize("case", MADE)
def test_static(case):
    with FakeTensorMode():
        old, new = (
            torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in (MADE["equal"], MADE[case])
        )
    check(old, new, case == "equal")


@pytest.mark.parametrize("case", ["equal", "twice the size", "a number that it may be"])
def test_symbolic(case):
    """Without a guard."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    old = mode.from_tensor(torch.empty(4, 6), symbolic_context=context)
    rows = {"equal": old.shape[0], "twice the size": 2 * old.shape[0], "a number that it may be": 4}[case]
    with mode:
        new = old.new_empty(rows, 6)
    check(old, new, case == "equal")
    assert not mode.shape_env.guards


def check(old, new, is_equal):
    graph = Graph()
    nodes = [graph.placeholder(name) for name in ("old", "new")]
    for node, value in zip(nodes, (old, new), strict=True):
        node.meta["val"] = value
    if is_equal:
        same_value(*nodes)
    else:
        with pytest.raises(VerificationError, match="its replacement new is"):
            same_value(*nodes)
