"""How an operator of this package is registered.

``torch.library.Library`` and not ``torch.library.custom_op``: one call through the latter costs about 2 us more, and it
registers one Python function for all devices, while ``dispatch_ffn_combine`` has another kernel on an NPU.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.node import has_side_effect

NAMESPACE = "moe_lowering"

# FRAGMENT, so that other parts of the package may define operators in the same namespace.
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


def register(
    schema: str,
    *,
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    npu: Callable[..., Any] | None = None,
    side_effect: bool = False,
) -> None:
    """Define an operator of the namespace ``moe_lowering``.

    Args:
        schema: as in ``docs/architecture.md``, with the operator's name first.
        cpu: the kernel that defines the meaning.
        fake: shapes and dtypes from shapes and dtypes; also the kernel for device "meta".
        npu: kernel for device "npu" (PrivateUse1).
        side_effect: keep calls whose results nobody reads. A rank that drops a collective hangs the others.
    """
    name = schema.split("(", 1)[0]
    qualified = f"{NAMESPACE}::{name}"
    library: Any = LIBRARY  # torch.library is not fully typed
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, _refuse_none(schema, cpu), "CPU")
    if npu is not None:
        library.impl(name, _refuse_none(schema, npu), "PrivateUse1")
    torch.library.register_fake(qualified, _refuse_none(schema, fake), lib=LIBRARY)
    if not schema.endswith("-> ()"):
        torch.library.register_autograd(qualified, _no_backward(qualified), lib=LIBRARY)
    if side_effect:
        packet = getattr(getattr(torch.ops, NAMESPACE), name)
        has_side_effect(packet)  # what dynamo puts into a graph when the packet was called
        has_side_effect(packet.default)


def _refuse_none(schema: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel`` with an error for None where the schema has ``Tensor``: torch takes that for an undefined tensor."""
    name, _, arguments = schema.partition(" -> ")[0].partition("(")
    kinds = [argument.split()[:2] for argument in re.split(r", ?", arguments.rstrip(")"))]
    required = [(at, kind[1]) for at, kind in enumerate(kinds) if kind[0] == "Tensor"]

    @functools.wraps(kernel)
    def checked(*given: Any, **named: Any) -> Any:
        for at, argument in required:  # they have no defaults, so torch hands them over by position
            if given[at] is None:
                raise ValueError(f"{name}: {argument} is None; accepted: a tensor")
        return kernel(*given, **named)

    return checked


def _no_backward(qualified: str) -> Callable[..., Any]:
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(
            f"{qualified} has no backward: moe_lowering is for inference. Run the model under torch.no_grad() or "
            "torch.inference_mode()"
        )

    return backward
