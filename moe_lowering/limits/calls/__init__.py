"""From a call of an Ascend operator to the named quantities that its limits read, and the check of the call.

A reader serves the calls that the pass would emit, the nodes of a graph and the simulator's kernels. Operators share names:
``tokens`` and ``max_tokens`` (of one rank, and the largest of any rank), ``hidden``, ``intermediate``, ``top_k``,
``experts`` (of all ranks), ``local_experts``, ``ep_size``, ``<tensor>_dtype`` as in ``"bfloat16"``, ``<tensor>_dims``.
Only shapes, strides and dtypes are read: tensors may be real, fake or symbolic. No guard is added.

To add an operator: a reader in the file of its family, with its entry in ``READERS`` there.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moe_lowering import _versions
from moe_lowering.limits.calls import communication, fused, matmul, quantised, routing
from moe_lowering.limits.calls.tensors import Arguments, Reader
from moe_lowering.limits.prover import Prover
from moe_lowering.limits.sources import cite, load_sources
from moe_lowering.limits.violations import Violation, check
from moe_lowering.limits.wording import Accepted, Bound, as_value

_READERS: dict[str, Reader] = {
    **routing.READERS,
    **matmul.READERS,
    **quantised.READERS,
    **communication.READERS,
    **fused.READERS,
}
OPERATORS = frozenset(_READERS)
_PYTHON_INT = Accepted(equals=Bound("a Python int", "a Python int"))
# Of a call that has ``tokens``: the quantities that number the tokens of the rank that calls, and of which quantity there
# is that many for each token; None for one.
PER_TOKEN: dict[str, str | None] = {
    **dict.fromkeys(
        ("tokens", "max_tokens", "ids_tokens", "row_tokens", "weights_tokens", "mask_tokens", "scale_rows")
    ),
    "indices_length": "top_k",
    "index_length": "top_k",
}
# What rows of called operators may read and no call shows.
CONTEXT = frozenset({
    "buffer_bytes", "weight_format", "top_k", "received", "equal_tokens", "mask_is_prefix", "has_vllm_ascend", "mode",
    "has_cann_ops_transformer", "counts_are_read", "vllm_ascend_installed", "vllm_ascend_declared",
    "vllm_ascend_is_as_declared", "vllm_ascend_build", "vllm_ascend_is_built_for_soc", "cann_ops_transformer_installed",
    "cann_ops_transformer_declared", "cann_ops_transformer_is_as_declared",
})  # fmt: skip


def quantities(op_name: str, arguments: Arguments) -> dict[str, Any]:
    """The named quantities of one call. What a call does not have (no bias, a missing axis) is None.

    Args:
        op_name: one of ``OPERATORS``, without namespace.
        arguments: every argument of the schema by name, defaults included, as ``bind`` gives them.
    """
    return _READERS[op_name](arguments)


_REQUIRED = object()


@functools.lru_cache(maxsize=256)
def _parameters(op: torch._ops.OpOverload) -> tuple[tuple[str, bool, Any], ...]:
    """(name, keyword only, default or _REQUIRED) of each argument; reading them from the schema is slow.

    What later versions of the operator take is there with its default: readers and kernels know one form of a call.
    """
    own = (
        (a.name, a.kwarg_only, a.default_value if a.has_default_value() else _REQUIRED) for a in op._schema.arguments
    )
    return (*own, *((name, True, default) for name, default in _versions.later_arguments(op).items()))


@functools.lru_cache(maxsize=256)
def _defaults_for_none(op: torch._ops.OpOverload) -> dict[str, Any]:
    """The defaults of optional arguments that have another one than None: ``int? group_list_type=0``."""
    return {
        a.name: a.default_value
        for a in op._schema.arguments
        if a.has_default_value() and a.default_value is not None and str(a.type).startswith("Optional")
    }


def bind(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by their names in the schema, with defaults filled in.

    None for an optional argument whose default is something else means that default: op-plugin reads it with ``value_or``.

    Raises:
        TypeError: when an argument is missing, unknown or given twice.
    """
    bound: dict[str, Any] = {}
    rest = dict(kwargs)
    for position, (name, keyword_only, default) in enumerate(_parameters(op)):
        if position < len(args) and not keyword_only:
            bound[name] = args[position]
            if name in rest:
                raise TypeError(f"{op}: {name} is given twice")
        elif name in rest:
            bound[name] = rest.pop(name)
        elif default is not _REQUIRED:
            bound[name] = default
        else:
            raise TypeError(f"{op}: {name} is missing")
    positional = sum(not keyword_only for _, keyword_only, _ in _parameters(op))
    if rest or len(args) > positional:
        raise TypeError(f"{op}: unknown arguments {sorted(rest) or len(args)}")
    bound.update({name: default for name, default in _defaults_for_none(op).items() if bound[name] is None})
    return bound


@functools.lru_cache(maxsize=256)
def _takes_sizes(op: torch._ops.OpOverload) -> frozenset[str]:
    """The arguments that the schema declares as SymInt: those may vary."""
    return frozenset(re.findall(r"SymInt(?:\[\d*\])?\??\s+(\w+)", str(op._schema)))


def varying_ints(op: torch._ops.OpOverload, name: str, arguments: Arguments) -> list[Violation]:
    """Plain-int arguments that receive a symbolic size: the schema would fix it at its present value."""
    sources = cite("wheel.schemas: these arguments are int, not SymInt", load_sources())
    return [
        Violation(
            code="call.symbolic_int",
            operator=name,
            quantity=argument,
            value=as_value(value),
            limit=_PYTHON_INT,
            sources=sources,
            says=f"{argument} is {{value}}, which varies; accepted: {_PYTHON_INT}",
            advises="pass 0 or -1 where the operator documents it as 'all', or give the bound",
        )
        for argument, value_or_list in arguments.items()
        for value in (value_or_list if isinstance(value_or_list, (list, tuple)) else (value_or_list,))
        if isinstance(value, torch.SymInt) and argument not in _takes_sizes(op)
    ]


def check_call(
    op: torch._ops.OpOverload,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    soc: str,
    extra: Mapping[str, Any] | None = None,
    prover: Prover | None = None,
    versions: Mapping[str, str] | None = None,
) -> list[Violation]:
    """Every rule that a call of an Ascend operator breaks; empty for operators that have no limit tables.

    Args:
        op: the overload, e.g. ``torch.ops.npu.npu_swiglu.default``.
        args, kwargs: as in the call; real, fake or symbolic tensors.
        soc: the SoC whose rows apply.
        extra: quantities that a call does not show, e.g. ``buffer_bytes`` (``CONTEXT``).
        prover, versions: see ``check``.
    """
    name = op._schema.name.rpartition("::")[2]
    if name not in OPERATORS:
        return []
    arguments = bind(op, args, kwargs)
    varying = varying_ints(op, name, arguments)
    if varying:
        return varying
    return check(name, soc, {**quantities(name, arguments), **(extra or {})}, prover, versions)
