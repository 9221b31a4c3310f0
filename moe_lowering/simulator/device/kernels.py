"""One kernel for every operator on device "npu": run the operator's CPU kernel on host aliases, now or at replay.

Outside a capture the kernel computes at once. Inside one it computes nothing: results are allocated with the shapes of
the operator's meta kernel, filled with NaN (or the smallest integer), and the call goes to the tape with its addresses.
In-place and ``out=`` operators write through the aliases; view operators never come here, they stay torch_npu's own.

What a capture forbids is refused here, where the operator's name is known: results whose size depends on data, values
that the host reads, random numbers (they would need the generator's state on the device), operators that torch_npu
would run on the CPU, and the generic operators of ``moe_lowering::``, which no device has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from moe_lowering.simulator.device import capture_state
from moe_lowering.simulator.device.hccl import require_communicators
from moe_lowering.simulator.device.memory import NPU, host_alias, new_like, on_npu, spoil, tree_to_host, tree_to_shadow
from moe_lowering.simulator.standins import SimulatorError

Kernel = Callable[..., Any]
GROUPS = {"group", "group_ep", "group_tp", "hcom"}
Around = Callable[[], contextlib.AbstractContextManager[None]]
Check = Callable[[tuple[Any, ...], dict[str, Any]], bool]
INDEX_BY_MASK = {
    "aten::index.Tensor",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
    "aten::_unsafe_index.Tensor",
}
# Operators of ours whose kernel reads sizes on the host, which no tag says.
READS_SIZES = {"moe_lowering::alltoall_experts"}
NOT_LOWERED = (
    "has no kernel on a device, as its block was not lowered; accepted: a graph in which MoeLowering replaces it (its "
    "report names the reason, strict=True raises it)"
)
# Operators whose tag says "size depends on data", where it does only without this argument.
SIZED_BY = {
    "aten::repeat_interleave.Tensor": (1, "output_size", None),
    "aten::repeat_interleave.self_Tensor": (3, "output_size", None),
    "aten::one_hot": (1, "num_classes", -1),
}


def kernel(op: torch._ops.OpOverload, around: Around = contextlib.nullcontext, real: bool = True) -> Kernel:
    """The npu kernel of an operator that has a CPU kernel and, to be captured, a meta kernel.

    Args:
        op: the operator.
        around: entered while the CPU kernel runs.
        real: a device has a kernel too; without, the operator runs, but not in a capture.
    """
    schema = op._schema
    name: str = op.name()
    returned = [_alias_of(schema, value) for value in schema.returns]
    only_written = bool(returned) and all(index is not None for index in returned)
    reads_host = _reads_host(op, name)

    def written(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The arguments that the schema returns, None for new results."""
        return [None if at is None else _argument(schema, at, args, kwargs) for at in returned]

    groups = [i for i, a in enumerate(schema.arguments) if schema.name.startswith("npu::") and a.name in GROUPS]

    def call(*args: Any, **kwargs: Any) -> Any:
        tape = capture_state.tape_in_progress(name)
        require_communicators(name, [_argument(schema, i, args, kwargs) or "" for i in groups])
        _check_arguments(name, args, kwargs)
        if tape is None:
            with around():
                value = _compute(op, schema, args, kwargs)
            if only_written or not schema.returns:
                return _pack_values(written(args, kwargs))
            return _replace_results(value, written(args, kwargs), _store_value)
        if not real:
            raise capture_state.refuse(name, NOT_LOWERED)
        if reads_host(args, kwargs):
            raise capture_state.refuse(
                name, "needs a value from the device on the host, or has a size that depends on data"
            )
        if torch.Tag.nondeterministic_seeded in op.tags:
            raise capture_state.refuse(name, "random numbers inside a capture are not simulated")
        return _record(op, name, around, args, kwargs, written(args, kwargs), only_written or not schema.returns)

    return call


def _record(
    op: torch._ops.OpOverload,
    name: str,
    around: Around,
    args: Any,
    kwargs: dict[str, Any],
    written: list[Any],
    only_written: bool,
) -> Any:
    host_args, host_kwargs = tree_map(_fix_operand, args), tree_map(_fix_operand, kwargs)

    def compute() -> Any:
        with around():
            return op(*host_args, **host_kwargs)

    if only_written:
        capture_state.record(name, compute)
        return _pack_values(written)
    shadow = op(*tree_to_shadow(args), **tree_to_shadow(kwargs))
    targets: list[torch.Tensor] = []

    def allocated(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            raise capture_state.refuse(name, f"returns {type(value).__name__}, which the host would read")
        out = new_like(value)
        targets.append(host_alias(out))
        spoil(targets[-1])
        return out

    result = _replace_results(shadow, written, allocated)

    def run() -> None:
        value = compute()
        values = value if isinstance(value, (tuple, list)) else [value]
        kept = [v for v, old in zip(values, written or [None] * len(values), strict=False) if old is None]
        store(targets, tree_leaves(kept))

    capture_state.record(name, run)
    return result


def store(targets: Sequence[torch.Tensor], values: Sequence[Any]) -> None:
    """Copy results to their fixed addresses; the shapes and dtypes are those that the meta kernel promised."""
    for target, value in zip(targets, values, strict=True):
        if target.shape != value.shape or target.dtype != value.dtype:
            raise SimulatorError(
                f"the meta kernel promised {target.dtype} {list(target.shape)}, "
                f"the CPU kernel gave {value.dtype} {list(value.shape)}"
            )
        target.copy_(value)


def _compute(op: torch._ops.OpOverload, schema: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    outs = [a.name for a in schema.arguments if a.is_out and on_npu(kwargs.get(a.name))]
    host = {**tree_to_host(kwargs), **{n: _empty_out(kwargs[n]) for n in outs if kwargs[n].numel() == 0}}
    value = op(*tree_to_host(args), **host)
    for name in outs:
        if kwargs[name].numel() == 0 and host[name].numel():
            kwargs[name].resize_(host[name].shape)
            host_alias(kwargs[name]).copy_(host[name])
    return value


def _empty_out(out: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=out.dtype)


def _store_value(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    out = new_like(value)
    host_alias(out).copy_(value)
    return out


def _fix_operand(value: Any) -> Any:
    """An operand as a tape keeps it: addresses of the device, and copies of host values (scalars given as tensors)."""
    if isinstance(value, torch.Tensor) and not on_npu(value):
        return value.detach().clone()
    return tree_to_host(value)


def _replace_results(value: Any, written: list[Any], make: Callable[[Any], Any]) -> Any:
    """The results of a call: the written arguments where the schema returns them, ``make(...)`` elsewhere."""
    if len(written) <= 1:
        return make(value) if not isinstance(value, (tuple, list)) else type(value)(tree_map(make, v) for v in value)
    return tuple(tree_map(make, v) if old is None else old for v, old in zip(value, written, strict=True))


def _pack_values(values: list[Any]) -> Any:
    if not values:
        return None
    return values[0] if len(values) == 1 else tuple(values)


def _alias_of(schema: Any, value: Any) -> int | None:
    """Index of the argument that a written return value is."""
    if value.alias_info is None or not value.alias_info.is_write:
        return None
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.before_set & value.alias_info.before_set:
            return index
    return None


def _argument(schema: Any, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[index] if index < len(args) else kwargs.get(schema.arguments[index].name)


def _check_arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What torch_npu refuses too: tensors of another device, but for host scalars and (outside a capture) indices.

    Raises:
        RuntimeError: as torch does.
    """
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != NPU:
        raise RuntimeError(f"{name}: Expected a '{NPU}' device type for generator but found '{generator.device.type}'")
    for value in tree_leaves((args, kwargs)):
        if isinstance(value, torch.Tensor) and not on_npu(value) and (value.dim() or value.device.type != "cpu"):
            if name not in INDEX_BY_MASK:
                raise RuntimeError(
                    f"{name}: Expected all tensors to be on the same device, but found at least two devices, npu and "
                    f"{value.device}"
                )
            if capture_state.is_capturing():
                raise capture_state.refuse(name, "copies indices from the host, which a replay would not see change")


def _reads_host(op: torch._ops.OpOverload, name: str) -> Check:
    """Whether a call needs the host to know data of the device."""
    if name in INDEX_BY_MASK:
        return lambda args, kwargs: any(
            isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8)
            for i in tree_flatten(args[1] if len(args) > 1 else kwargs["indices"])[0]
        )
    if name in SIZED_BY:
        at, keyword, absent = SIZED_BY[name]
        return lambda args, kwargs: (args[at] if len(args) > at else kwargs.get(keyword, absent)) == absent
    tags = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
    forbidden = name in READS_SIZES or any(tag in op.tags for tag in tags)
    return lambda args, kwargs: forbidden
