"""Find the operators of a graph that torchair's GE mode cannot convert, before torchair fails at one of them.

``require_converters`` raises one error that names each such operator, why it has no GE converter, and the line of the
model that it comes from.

Contract. Reads the graph, never edits it. Source: wheel.fx2ge: _parse_node_internal, get_or_auto_gen_converter.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from moe_lowering.backends import ge_converters
from moe_lowering.passes.verifier import GENERIC

NAMESPACE = "moe_lowering"
# Operators that torchair converts without a converter (fx2ge_converter.py, _SPECIAL_TARGETS and _parse_node_internal).
SPECIAL = frozenset(
    (
        "air.scope_enter.default",
        "air.scope_exit.default",
        "air.record.default",
        "air.wait.default",
        "aten.sym_stride.int",
        "aten.sym_storage_offset.default",
    )
)


class GeConversionError(RuntimeError):
    """The graph cannot be converted for GE. The message names each operator, where it came from, and why."""


def require_converters(graph: Graph, why_left: Sequence[str] = ()) -> None:
    """Raises unless every operator has a GE converter, or one that torchair generates from a registered IR.

    Args:
        why_left: what the report says about blocks that were not lowered.

    Raises:
        GeConversionError: names each operator that has none, once, with the line of the model that it came from.
    """
    lines = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target not in lines:
            reason = missing_converter(node.target, node.meta.get("val"))
            if reason:
                lines[node.target] = f"{node.name} ({node.target}): {reason}{_node_origin(node)}"
    if lines:
        text = "\n  ".join([*lines.values(), *why_left])
        raise GeConversionError(f"torchair's GE mode cannot convert:\n  {text}")


def missing_converter(target: Any, value: Any = None) -> str:
    """Why torchair cannot convert an operator; "" when it can. ``value``: the fake result, which may make it needless."""
    from torchair._ge_concrete_graph import fx2ge_converter as ge
    from torchair.core import _torchair

    if not isinstance(target, torch._ops.OpOverload) or str(target) in SPECIAL or _empty(value):
        return ""
    name = target._schema.name.split("::")[1]
    if target.namespace == NAMESPACE and name in GENERIC:
        return "a generic operator of moe_lowering, which the lowering left in the graph"
    if target.namespace == NAMESPACE and name in ge_converters.REFUSED:
        return ge_converters.REFUSED[name]
    converter = ge._get_converter(target)
    if converter is not None and _only_raises(converter):
        return "its GE converter only says that it is not supported"
    if converter is not None:
        return ge_converters.missing_ir(name) if target.namespace == NAMESPACE else ""
    if target.namespace in ("aten", "prim", "prims"):
        return "no GE converter"
    type_ = "".join(word.capitalize() for word in name.removesuffix("_functional").split("_"))
    status = _torchair.get_registered_ir_def(type_)[0]
    return "" if status == "SUCCESS" else f"no GE converter, and no IR {type_} is registered to generate one from"


@functools.cache
def _only_raises(converter: Any) -> bool:
    """torchair registers converters for many overloads that do nothing but raise: no way through them returns."""
    code = inspect.unwrap(converter).__code__
    return not any(instruction.opname.startswith("RETURN") for instruction in dis.get_instructions(code))


def _empty(value: Any) -> bool:
    """Results without elements become constants."""
    values = value if isinstance(value, (tuple, list)) else [value]
    return bool(values) and all(
        isinstance(v, torch.Tensor) and all(isinstance(s, int) for s in v.shape) and v.numel() == 0 for v in values
    )


def _node_origin(node: Node) -> str:
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if "File " in line]
    return f"; {lines[-1]}" if lines else ""
