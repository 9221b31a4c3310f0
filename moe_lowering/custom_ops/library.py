"""How an operator of this package is registered, and how its signature is written.

An operator's arguments stand in one place, a record: the schema is made from its fields, and every kernel (fake, CPU,
device) and every check takes it; ``passes.graph.arguments`` reads it from a node. Records are named tuples: a frozen dataclass
takes 2 us to make. Operators with a few arguments have a schema as text, and kernels that take those.

``torch.library.Library`` and not ``torch.library.custom_op``: one call through the latter costs about 2 us more, and it
registers one Python function for all devices, while ``dispatch_ffn_combine`` has another kernel on an NPU.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_type_hints

import torch
from torch.fx.node import has_side_effect

NAMESPACE = "moe_lowering"

# FRAGMENT, so that other parts of the package may define operators in the same namespace.
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

# What stands for a tensor in a record of arguments: a tensor, real or fake, or the node of a graph that makes it.
Value = TypeVar("Value")
_SEQUENCE: Any = Sequence  # as an object: for a type checker Sequence[Value] is a type, and has no free variable here
_SCHEMA_TYPES: dict[Any, str] = {
    Value: "Tensor",
    Value | None: "Tensor?",
    _SEQUENCE[Value]: "Tensor[]",
    _SEQUENCE[Value] | None: "Tensor[]?",
    int: "int",
    float: "float",
    bool: "bool",
    str: "str",
    torch.dtype | None: "ScalarType?",
}


def schema_of(name: str, call: Any, returns: str) -> str:
    """The schema of the operator whose arguments are the fields of the named tuple ``call``; ``returns`` as in a schema."""
    types = get_type_hints(call)
    arguments = [f"{_SCHEMA_TYPES[types[field]]} {field}{_default(call, field)}" for field in call._fields]
    return f"{name}({', '.join(arguments)}) -> {returns}"


def _default(call: Any, field: str) -> str:
    if field not in call._field_defaults:
        return ""
    default = call._field_defaults[field]
    return f'="{default}"' if isinstance(default, str) else f"={default}"


def register(
    schema: str,
    call: type[Any] | None = None,
    *,
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    npu: Callable[..., Any] | None = None,
    side_effect: bool = False,
) -> None:
    """Define an operator of the namespace ``moe_lowering``.

    Args:
        schema: as in ``docs/architecture.md``, with the operator's name first.
        call: the record that the kernels take, of which ``schema_of`` made the schema. None: they take the arguments.
        cpu: the kernel that defines the meaning.
        fake: shapes and dtypes from shapes and dtypes; also the kernel for device "meta".
        npu: kernel for device "npu" (PrivateUse1).
        side_effect: keep calls whose results nobody reads. A rank that drops a collective hangs the others.
    """
    name = schema.split("(", 1)[0]
    qualified = f"{NAMESPACE}::{name}"
    library: Any = LIBRARY  # torch.library is not fully typed
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, bind_kernel(schema, cpu, call), "CPU")
    if npu is not None:
        library.impl(name, bind_kernel(schema, npu, call), "PrivateUse1")
    torch.library.register_fake(qualified, bind_kernel(schema, fake, call), lib=LIBRARY)
    if not schema.endswith("-> ()"):
        torch.library.register_autograd(qualified, _refuse_backward(qualified), lib=LIBRARY)
    if side_effect:
        packet = getattr(getattr(torch.ops, NAMESPACE), name)
        has_side_effect(packet)  # what dynamo puts into a graph when the packet was called
        has_side_effect(packet.default)


def bind_kernel(schema: str, kernel: Callable[..., Any], call: type[Any] | None = None) -> Callable[..., Any]:
    """The function that torch calls with the arguments of a schema: it calls ``kernel``, with the record ``call`` of
    them if there is one.

    It refuses None where the schema has ``Tensor``: torch takes that for an undefined tensor.
    """
    name, _, arguments = schema.partition(" -> ")[0].partition("(")
    kinds = [argument.split()[:2] for argument in re.split(r", ?", arguments.rstrip(")"))]
    required = [(at, kind[1]) for at, kind in enumerate(kinds) if kind[0] == "Tensor"]

    @functools.wraps(kernel)
    def checked(*arguments: Any, **named: Any) -> Any:
        for at, argument in required:  # they have no defaults, so torch hands them over by position
            if arguments[at] is None:
                raise ValueError(f"{name}: {argument} is None; accepted: a tensor")
        return kernel(*arguments, **named) if call is None else kernel(call(*arguments, **named))

    return checked


def check_once(check: Callable[[Any], None], call: Any) -> None:
    """Check the arguments of a CPU kernel, which reads of its tensors shapes and dtypes alone, unless equal ones passed before.

    A decode step calls each operator with the same shapes in every layer, and its checks took a third of its time.
    """
    key = (check, *map(_shapes_of, call))
    if key not in _PASSED:
        check(call)
        if len(_PASSED) >= MOST_PASSED:
            _PASSED.clear()
        _PASSED.add(key)


_PASSED: set[tuple[Any, ...]] = set()
MOST_PASSED = 4096


def _shapes_of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype
    if isinstance(value, (list, tuple)):
        return tuple((item.shape, item.dtype) for item in value)
    return type(value), value  # 1, 1.0 and True are equal, and not the same argument


def _refuse_backward(qualified: str) -> Callable[..., Any]:
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(
            f"{qualified} has no backward: moe_lowering is for inference. Run the model under torch.no_grad() or "
            "torch.inference_mode()"
        )

    return backward
