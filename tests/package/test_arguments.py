"""Arguments by name: the records of the operators, how passes read them from nodes, and the record of a block.

Each operator's arguments stand once, in its record; what is written beside it (the documentation) is compared here.
"""

from __future__ import annotations

import dataclasses
import importlib
import operator
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.fx import Graph, Node

from moe_lowering import Deployment, MoE, custom_ops, testing
from moe_lowering.custom_ops.dispatch import DispatchCall
from moe_lowering.custom_ops.library import bind_kernel, schema_of
from moe_lowering.passes import block_specs, find_blocks
from moe_lowering.passes.block_specs import Layer, spec_of_layer
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.graph.arguments import argument, arguments, explicit_arguments, read, results
from moe_lowering.passes.verifier import GENERIC
from moe_lowering.quantisation import quantise_experts
from moe_lowering.vocabulary import EXPERT_FORMATS

MANY = 5  # an operator with more arguments has a record
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, TOKENS = 64, 32, 4, 2, 6


def record_of(name: str) -> Any:
    module = importlib.import_module(f"moe_lowering.custom_ops.{name}")
    found = [
        v for k, v in vars(module).items() if k.endswith("Call") and getattr(v, "__module__", "") == module.__name__
    ]
    assert len(found) <= 1, found
    return found[0] if found else None


def overload(name: str) -> Any:
    return getattr(torch.ops.moe_lowering, name).default


def test_operators_with_many_arguments_have_records() -> None:
    assert {name for name in custom_ops.__all__ if record_of(name)} == {
        name for name in custom_ops.__all__ if len(overload(name)._schema.arguments) > MANY
    }


RECORDS = [name for name in custom_ops.__all__ if record_of(name)]


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_is_what_torch_has_as_the_schema(name: str) -> None:
    record, schema = record_of(name), overload(name)._schema
    assert [a.name for a in schema.arguments] == list(record._fields)
    assert {a.name: a.default_value for a in schema.arguments if a.has_default_value()} == record._field_defaults


ARCHITECTURE = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
SCHEMAS = " ".join(ARCHITECTURE.partition("## Generic operators\n\n")[2].partition("\n\n")[0].split())


@pytest.mark.parametrize("name", (*sorted(GENERIC), "assert_tokens", "assert_agreement"))
def test_the_documentation_has_the_schema(name: str) -> None:
    schema = str(overload(name)._schema).removeprefix("moe_lowering::")
    schema = re.sub(r"[\d.]+e-\d+", lambda number: repr(float(number[0])), schema)  # torch prints all 17 digits
    assert schema in SCHEMAS
    assert schema.replace(")", ", int more)", 1) not in SCHEMAS


def test_a_kind_that_no_schema_has_is_refused() -> None:
    class Odd(NamedTuple):
        x: complex

    with pytest.raises(KeyError, match="complex"):
        schema_of("odd", Odd, "Tensor")


def test_kernels_take_the_record() -> None:
    seen: list[Any] = []
    kernel = bind_kernel("dispatch(Tensor x, Tensor? x_scale) -> ()", seen.append, DispatchCall)
    x, ids = torch.ones(2, 3), torch.ones(2, 1, dtype=torch.int32)
    kernel(x, None, ids, None, 4, "", 1, "", 1, 0, max_rows=7)
    assert seen == [DispatchCall(x, None, ids, None, 4, "", 1, "", 1, 0, 7, 0, 1, False)]
    with pytest.raises(ValueError, match=r"^dispatch: x is None; accepted: a tensor"):
        kernel(None, None, ids, None, 4, "", 1, "", 1, 0, 7)


# ---------------------------------------------------------------------------------------------------------------- nodes


def node_of(name: str, *args: Any, **kwargs: Any) -> Node:
    return Graph().create_node("call_function", overload(name), args, kwargs)


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("by_name", [0, 1, 3])
def test_a_node_reads_as_the_record(name: str, by_name: int) -> None:
    """Whichever arguments are written by position, by name, or left out."""
    record = record_of(name)
    required = [field for field in record._fields if field not in record._field_defaults]
    values = {field: f"value of {field}" for field in required}
    split = len(required) - by_name
    node = node_of(name, *(values[f] for f in required[:split]), **{f: values[f] for f in required[split:]})
    expected = {**record._field_defaults, **values}
    assert read(record, node)._asdict() == expected == arguments(node)
    assert list(arguments(node)) == list(record._fields)
    assert {field: argument(node, field) for field in record._fields} == expected
    assert explicit_arguments(node) == values


def test_what_a_node_does_not_have() -> None:
    node = node_of("combine", 1, 2)
    with pytest.raises(TypeError, match="handle"):
        read(find_blocks.CombineCall[Node], node)
    with pytest.raises(KeyError, match="max_rows"):
        argument(node, "max_rows")
    with pytest.raises(TypeError, match="max_rows"):
        read(find_blocks.CombineCall[Node], node_of("combine", *range(11), max_rows=0))


def users_of(*indices: Any) -> dict[str, str] | None:
    graph = Graph()
    node = graph.create_node("call_function", overload("dispatch"), (), {})
    for index in indices:
        graph.create_node("call_function", operator.getitem, (node, index), name=f"item_{index}".replace("-", "m"))
    found = results(node)
    return None if found is None else {name: item.name for name, item in found.items()}


def test_results_by_name() -> None:
    assert users_of() == {}
    assert users_of(2, -1) == {"counts": "item_2", "handle": "item_m1"}


@pytest.mark.parametrize("indices", [(0, 0), (3, -1), (4,), (-5,), ("rows",), (slice(0, 1),)])
def test_results_that_are_taken_in_another_way(indices: tuple[Any, ...]) -> None:
    if isinstance(indices[0], slice):
        graph = Graph()
        node = graph.create_node("call_function", overload("dispatch"), (), {})
        graph.create_node("call_function", operator.getitem, (node, indices[0]))
        assert results(node) is None
    else:
        assert users_of(*indices) is None


# --------------------------------------------------------------------------------------------------------------- blocks


def spec_in_graph(monkeypatch: pytest.MonkeyPatch, layer: MoE, dtype: torch.dtype) -> BlockSpec:
    made: list[BlockSpec] = []

    def recorded(*facts: Any) -> BlockSpec:
        made.append(block_specs.spec_of_graph(*facts))
        return made[-1]

    monkeypatch.setattr(find_blocks, "spec_of_graph", recorded)
    testing.lower_graph(layer, torch.ones(TOKENS, HIDDEN, dtype=dtype), deployment=Deployment(), comm="allgather")
    (spec,) = made
    return spec


def without_devices(spec: BlockSpec) -> BlockSpec:
    """What a description does not know of tensors: the device, and strides, which are those of contiguous ones."""
    tensors = {
        field.name: dataclasses.replace(
            each,
            kinds=tuple(dataclasses.replace(k, device=None, strides=k.stride()) for k in each.kinds),
        )
        for field in dataclasses.fields(spec.tensors)
        for each in [getattr(spec.tensors, field.name)]
    }
    return dataclasses.replace(spec, key=(), tensors=dataclasses.replace(spec.tensors, **tensors))


@pytest.mark.parametrize(
    ("quantisation", "dtype", "has_bias"),
    [
        ("none", torch.float32, True),
        *((name, torch.bfloat16, False) for name in EXPERT_FORMATS),
        ("w8a8", torch.float16, False),
    ],
)
def test_a_described_layer_is_judged_as_in_a_graph(
    monkeypatch: pytest.MonkeyPatch, quantisation: str, dtype: torch.dtype, has_bias: bool
) -> None:
    model = MoE(
        HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, activation="swiglu_oai", limit=7.0, expert_bias=has_bias, dtype=dtype
    )
    if quantisation != "none":
        quantise_experts(model, quantisation)
    graph = spec_in_graph(monkeypatch, model, dtype)
    layer = Layer(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, dtype, "swiglu_oai", 7.0, 1.702, has_bias=has_bias)
    described = spec_of_layer(layer, Deployment(), TOKENS, quantisation)
    assert without_devices(graph) == without_devices(described)
    other = spec_of_layer(dataclasses.replace(layer, intermediate=2 * INTERMEDIATE), Deployment(), TOKENS, quantisation)
    assert without_devices(graph) != without_devices(other)
