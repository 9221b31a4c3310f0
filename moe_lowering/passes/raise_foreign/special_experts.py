"""Zero, copy and const experts of an MC2 chain: ids past the experts', for which no row is sent.

The generic ``dispatch`` knows ids of experts that give nothing, however many kinds of these a chain has. A copy expert gives the
token itself, which combine reads as ``ori_x``: weights times that are added beside the block. So is what a const expert gives:
``const_expert_alpha_1 * ori_x + const_expert_alpha_2 * const_expert_v``, a line of each for each of these experts.
Sources: op_plugin.dispatch, op_plugin.combine: ids and what each kind gives.
"""

from __future__ import annotations

from torch.fx import Node

from moe_lowering.passes.graph.arguments import argument
from moe_lowering.passes.raise_foreign.chain_walk import has_argument, same_sizes, value_of
from moe_lowering.passes.raise_foreign.records import Constant, Copied, NotThisForm

SPECIAL = ("zero_expert_num", "copy_expert_num", "const_expert_num")  # in the order of their ids


def require_special(node: Node) -> None:
    """The numbers of special experts of a dispatch or combine are known, and 0 or more.

    Raises:
        NotThisForm: one is not.
    """
    for name in filter(lambda name: has_argument(node, name), SPECIAL):
        number = argument(node, name)
        if type(number) is not int or number < 0:
            raise NotThisForm(node, "raise.special_experts", f"{node.name}: {name} is {number!r}", "0 or more")


def special_experts(node: Node) -> int:
    """How many of all kinds there are, of a dispatch or combine that ``require_special`` accepts."""
    return sum(argument(node, name) for name in SPECIAL if has_argument(node, name))


def copied_tokens(combine: Node) -> Copied | None:
    """What copy experts add at a combine; None without any. ``ori_x`` is not read then.

    Raises:
        NotThisForm: there is no ``ori_x`` [T, H] for them.
    """
    copies = argument(combine, "copy_expert_num") if has_argument(combine, "copy_expert_num") else 0
    if not copies:
        return None
    x, result = argument(combine, "ori_x"), value_of(combine)
    if not isinstance(x, Node) or not same_sizes(value_of(x), result) or value_of(x).dtype != result.dtype:
        seen = f"{combine.name}: ori_x is {x} with {copies} copy experts"
        raise NotThisForm(combine, "raise.special_experts", seen, f"{result.dtype} {tuple(result.shape)}")
    first = argument(combine, "moe_expert_num") + argument(combine, "zero_expert_num")
    return Copied(x, first, first + copies)


_OF_CONST = ("const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")


def constant_experts(combine: Node) -> Constant | None:
    """What const experts add at a combine; None without any.

    Raises:
        NotThisForm: there is no ``ori_x`` [T, H], or no [C, H] of what they mix it with.
    """
    number = argument(combine, "const_expert_num") if has_argument(combine, "const_expert_num") else 0
    if not number:
        return None
    result = value_of(combine)
    x, alpha_1, alpha_2, v = tensors = tuple(argument(combine, name) for name in ("ori_x", *_OF_CONST))
    lines = result.new_empty(number, result.shape[1])
    for name, node, like in zip(("ori_x", *_OF_CONST), tensors, (result, lines, lines, lines), strict=True):
        if not isinstance(node, Node) or not same_sizes(value_of(node), like) or value_of(node).dtype != result.dtype:
            seen = f"{combine.name}: {name} is {node} with {number} const experts"
            raise NotThisForm(combine, "raise.special_experts", seen, f"{result.dtype} {tuple(like.shape)}")
    first = argument(combine, "moe_expert_num") + argument(combine, "zero_expert_num")
    first += argument(combine, "copy_expert_num")
    return Constant(x, alpha_1, alpha_2, v, first, first + number)
