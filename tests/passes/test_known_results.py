"""Values that are made without running the operator are what the operator gives (``passes/emission/known_results.py``)."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from moe_lowering.passes.blocks import shape_key, size_key
from moe_lowering.passes.emission.known_results import RULES, known_result

aten = torch.ops.aten
FLOATS = (torch.float32, torch.bfloat16)
DTYPES = (*FLOATS, torch.int32)


class Rows:
    """Tensors of a symbolic number of rows."""

    def __init__(self):
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        env, source = self.mode.shape_env, ConstantSource("T")
        symbol = env.create_symbol(64, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
        self.tokens = env.create_symintnode(symbol, hint=64, source=source)

    def make(self, *inner, dtype=torch.float32, factor=1):
        with self.mode:
            return torch.empty(self.tokens * factor, *inner, dtype=dtype)


def calls(rows, dtype):
    """(target, arguments, by name) of calls whose results are described for a dtype."""
    x, line = rows.make(8, dtype=dtype), rows.make(dtype=dtype, factor=16)
    yield aten._to_copy.default, (x,), {"dtype": torch.int32}
    yield aten._to_copy.default, (line,), {"dtype": torch.bfloat16}
    yield aten.add.Tensor, (x, rows.make(1, dtype=dtype)), {}
    yield aten.add.Tensor, (x, 3), {}
    yield aten.mul.Tensor, (x, x), {}
    yield aten.remainder.Scalar, (line, rows.tokens), {}
    yield aten.remainder.Scalar, (x, 7), {}
    yield aten.reshape.default, (x, [-1]), {}
    flat = rows.make(dtype=dtype, factor=4 * 8)
    yield aten.reshape.default, (flat, [4, rows.tokens, 8]), {}
    yield torch.ops._c10d_functional.wait_tensor.default, (rows.make(8, dtype=dtype, factor=16),), {}
    if dtype.is_floating_point:
        yield aten.add.Tensor, (x, 1e-20), {}
        yield aten.div.Tensor, (x, rows.make(1, dtype=dtype)), {}
        yield aten.sigmoid.default, (x,), {}
        yield aten.sum.dim_IntList, (x, [-1], True), {}
        with rows.mode:
            ranks = torch.empty(4, rows.tokens, 8, dtype=dtype)
        yield aten.sum.dim_IntList, (ranks, [0]), {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_known_result_is_what_the_operator_gives(dtype):
    rows, seen = Rows(), set()
    for target, args, named in calls(rows, dtype):
        seen.add(target)
        ours = known_result(target, args, named, rows.mode)
        guards = len(rows.mode.shape_env.guards)
        with rows.mode:
            theirs = target(*args, **named)
        assert ours is not None, target
        assert shape_key(ours) == shape_key(theirs), target
        assert size_key(ours.untyped_storage().nbytes()) == size_key(theirs.untyped_storage().nbytes()), target
        assert ours.storage_offset() == 0 and type(ours) is type(theirs) and ours.fake_mode is rows.mode
        shares = ours.untyped_storage()._cdata == args[0].untyped_storage()._cdata
        assert shares == (target is aten.reshape.default), "no value but a view shares a storage"
        assert len(rows.mode.shape_env.guards) == guards == 0, "neither adds a guard"
    assert seen == set(RULES) if dtype.is_floating_point else seen < set(RULES)


def test_what_is_not_described_is_asked():
    rows = Rows()
    x, ints = rows.make(8), rows.make(8, dtype=torch.int32)
    with rows.mode:
        static, wide = torch.empty(64, 8), rows.make(16)
        other_rows, turned = rows.make(8, factor=2), torch.empty(8, rows.tokens).t()
        flat, ranks = rows.make(factor=4 * 8), torch.empty(4, rows.tokens, 8)
    for target, args, named in (
        (aten.add.Tensor, (static, static), {}),  # sizes are numbers
        (aten.add.Tensor, (turned, x), {}),  # the strides are
        (aten.add.Tensor, (wide[:, :8], x), {}),  # others' columns between
        (aten.add.Tensor, (x, other_rows), {}),  # rows do not fit
        (aten.add.Tensor, (rows.make(1), x), {}),  # the result is wider
        (aten.add.Tensor, (ints, x), {}),  # the result is float32
        (aten.add.Tensor, (ints, 0.5), {}),
        (aten.mul.Tensor, (rows.make(8, dtype=torch.bool), 2), {}),  # the result is int64
        (aten.add.Tensor, (x, True), {}),
        (aten.add.Tensor, (x, x), {"alpha": 2}),
        (aten.div.Tensor, (ints, 2), {}),
        (aten.remainder.Scalar, (ints, 0.5), {}),
        (aten.sigmoid.default, (ints,), {}),
        (aten.sum.dim_IntList, (ints, [-1], True), {}),
        (aten.sum.dim_IntList, (x, [0], True), {}),
        (aten.sum.dim_IntList, (x, [-1], False), {}),
        (aten.sum.dim_IntList, (x, [0]), {}),
        (aten.sum.dim_IntList, (ranks, [1]), {}),
        (aten.sum.dim_IntList, (ranks, [0], True), {}),
        (aten.sum.dim_IntList, (ranks.int(), [0]), {}),
        (aten.sum.dim_IntList, (ranks[:, :, :4], [0]), {}),  # others' columns between
        (aten.sum.dim_IntList, (static, [0]), {}),
        (aten.reshape.default, (static, [-1]), {}),
        (aten.reshape.default, (turned, [-1]), {}),  # a copy
        (aten.reshape.default, (wide[:, :8], [-1]), {}),  # a copy
        (aten.reshape.default, (flat, [-1]), {}),
        (aten.reshape.default, (flat, [4, rows.tokens, 4]), {}),  # another number of elements
        (aten.reshape.default, (flat, [-1, rows.tokens, 8]), {}),
        (aten.reshape.default, (flat, [rows.tokens, 4, 8]), {}),
        (aten.reshape.default, (x, [2, rows.tokens, 4]), {}),  # no line
        (aten._to_copy.default, (x,), {"dtype": torch.int32, "device": "cpu"}),
        (aten.relu.default, (x,), {}),
    ):
        assert known_result(target, args, named, rows.mode) is None, (target, args, named)
