"""``python -O`` leaves asserts out: none of the package does anything, and what users and graphs rely on stays."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

import moe_lowering
from moe_lowering.passes import token_ranges
from moe_lowering.testing import graphs

PACKAGE = Path(moe_lowering.__file__).parent
LOOKS = {"isinstance", "callable", "len"}  # calls that change nothing


def test_no_assert_does_anything():
    found, asserts = [], 0
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Assert):
                continue
            asserts += 1
            calls = [each.func for each in ast.walk(node.test) if isinstance(each, ast.Call)]
            done = [ast.unparse(call) for call in calls if ast.unparse(call) not in LOOKS]
            found += [f"{file.name}:{node.lineno}: {ast.unparse(node)}"] if done else []
    assert asserts > 50 and not found


@pytest.fixture(params=[0, 1], ids=["python", "python -O"])
def compiled(request, monkeypatch):
    """A module as ``python -O`` compiles it, or as Python does."""

    def compile_again(module: ModuleType) -> ModuleType:
        again = ModuleType(f"{module.__name__}_again")
        monkeypatch.setitem(sys.modules, again.__name__, again)
        exec(
            compile(Path(module.__file__).read_text("utf-8"), module.__file__, "exec", optimize=request.param),
            vars(again),
        )
        return again

    return compile_again


def report(**fields):
    block = SimpleNamespace(name="moe", comm="mc2", reason="", verdicts={})
    common = {"blocks": (block,), "unlowered": (), "not_capturable": (), "fully_lowered": True}
    return SimpleNamespace(**{**common, **fields})


WRONG = {
    "left": ({"fully_lowered": False}, {}),
    "none": ({"blocks": ()}, {}),
    "number": ({}, {"blocks": 2}),
    "comm": ({}, {"comm": "allgather"}),
    "order": ({}, {"ops": ["b", "a"]}),
}


def test_assertions_on_graphs_hold(compiled):
    again = compiled(graphs)
    lowered = again.Lowered(None, report(), (), ("a", "b"))
    again.assert_lowered(lowered, comm="mc2", blocks=1, ops=["a", "b"])
    for fields, options in WRONG.values():
        with pytest.raises(AssertionError):
            again.assert_lowered(again.Lowered(None, report(**fields), (), ("a", "b")), **options)
    again.assert_refused(
        again.Lowered(None, report(unlowered=(("moe", "[raise.scope] x"),)), (), ()), code="raise.scope"
    )
    for fields in ({"blocks": ()}, {}):
        with pytest.raises(AssertionError):
            again.assert_refused(again.Lowered(None, report(**fields), (), ()), code="raise.scope")


def test_a_graph_that_serves_a_range_is_guarded(compiled):
    shapes = ShapeEnv()
    symbol = shapes.create_symbol(16, ConstantSource("T"), dynamic_dim=DimDynamic.DYNAMIC)
    tokens = shapes.create_symintnode(symbol, hint=16)
    assert isinstance(tokens, torch.SymInt) and not shapes.guards
    compiled(token_ranges).request_guard(tokens, token_ranges.TokenRange(4, 512))
    assert sorted(str(guard.expr) for guard in shapes.guards) == [f"{symbol} <= 512", f"{symbol} >= 4"]
