"""Notes on experts' tensors that a lowered graph casts in every forward, since they are stored in another dtype than is read.

A cast costs a kernel in every layer and step; stored in the dtype that is read, a tensor costs it once. Casts of the model's
own in front of a block are told too. What the graph computes otherwise (a LoRA merge) is the model's affair.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.fx import Node

from moe_lowering.custom_ops.grouped_mlp import GroupedMlpCall
from moe_lowering.passes.operands import OPERAND_NAMES, is_stored

CODE = "cost.cast"  # what a note begins with, in brackets
_MODELS_OWN = "cost.cast_in_model"

aten = torch.ops.aten
_CASTS = frozenset({aten._to_copy.default})
_BITS = frozenset({aten.view.dtype, aten.bitwise_and.Tensor})  # between the casts of scales that become bits, or were


def note_casts(experts: GroupedMlpCall[Node], created: Iterable[Node], comm: str) -> tuple[str, ...]:
    """One note for each argument of the experts of which a tensor is cast, by the rewrite or by the model.

    Args:
        experts: the arguments of the block's grouped MLP.
        created: the nodes of the rewrite.
        comm: the implementation that they are of.
    """
    made, notes = set(created), []
    for name in OPERAND_NAMES:
        nodes: Sequence[Node] = getattr(experts, name) or ()
        if before := [cast for node in nodes if (cast := _cast_of_stored(node)) is not None]:
            stored, read = before[0]
            notes.append(
                f"[{_MODELS_OWN}] the model casts {name} from {stored} to {read} in every forward"
                f"{_count(len(before))}: store it in {read}"
            )
        ends = [end for node in nodes if is_stored(node) and (end := _last_cast(node, made)) is not None]
        if ends:
            dtype = _dtype(ends[0])
            notes.append(
                f"[{CODE}] {name} is stored in {_dtype(nodes[0])} and cast to {dtype} in every forward"
                f"{_count(len(ends))}, as {comm} reads it: store it so ({_helper(name, dtype)})"
            )
    return tuple(notes)


def _count(tensors: int) -> str:
    return "" if tensors == 1 else f", {tensors} tensors"


def _dtype(node: Node) -> str:
    return str(node.meta["val"].dtype).removeprefix("torch.")


def _cast_of_stored(node: Node) -> tuple[str, str] | None:
    """(stored dtype, that of the block's argument) where the graph in front of a block casts a stored tensor for it."""
    if node.target not in _CASTS or not isinstance(node.args[0], Node) or not is_stored(node.args[0]):
        return None
    stored, read = _dtype(node.args[0]), _dtype(node)
    return None if stored == read else (stored, read)


def _last_cast(node: Node, made: set[Node]) -> Node | None:
    """The last node of the chain of casts, and of what turns numbers to bits or back, that the rewrite began with a tensor."""
    end, any_cast = node, False
    while step := next((user for user in end.users if user in made and user.target in _CASTS | _BITS), None):
        any_cast = any_cast or step.target in _CASTS
        end = step
    return end if any_cast else None


def _helper(name: str, dtype: str) -> str:
    """Who stores an argument in a dtype."""
    if dtype == "int64":
        return "moe_lowering.quantisation.scale_bits makes it"
    if name.endswith(("_scale", "_offset")):
        return f"moe_lowering.quantisation.quantise_weight(..., scale_dtype=torch.{dtype}), or tensor.to(torch.{dtype})"
    return f"tensor.to(torch.{dtype})"
