"""``npu_moe_distribute_combine_add_rms_norm``: a combine, a residual that is added, and the RMS norm of the sum, in one operator.

    x = combine(...) + residual_x;  y = x / sqrt(mean(x^2) + norm_eps) * gamma;  rstd = 1 / sqrt(mean(x^2) + norm_eps)

y and x are [T, 1, H], as the residual is. A layer that ends so becomes a block and ``npu_add_rms_norm`` behind it, which rounds x
before it is normalised. The operator's page has a formula that weighs ``shared_expert_x`` and a text that does not: with it the
layer is left, as with copy and const experts.
Sources: op_plugin.combine_add_rms_norm: formulas, shapes, reserved arguments; wheel.docs: npu_add_rms_norm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from moe_lowering.passes.blocks import size_key
from moe_lowering.passes.emission.emitter import Emitter
from moe_lowering.passes.graph.arguments import argument
from moe_lowering.passes.raise_foreign.chain_walk import Walk, require, value_of
from moe_lowering.passes.raise_foreign.records import Norm, NotThisForm

NORMED = "npu_moe_distribute_combine_add_rms_norm"
_RESERVED = {
    **dict.fromkeys(("activation_scale", "weight_scale", "group_list", "expand_scales", "shared_expert_x"), (None,)),
    **dict.fromkeys(("out_dtype", "group_list_type"), (0,)),
}


def read_norm(walk: Walk, combine: Node) -> Norm:
    """Of a combine that adds and normalises.

    Raises:
        NotThisForm: reserved arguments, nothing that is read, or sizes and dtypes that are not those of the operator's page.
    """
    require(combine, {**_RESERVED, "copy_expert_num": (0,), "const_expert_num": (0,)})
    items = walk.results(combine, 3)
    results = tuple((at, node) for at, node in enumerate(items) if node is not None)
    residual, gamma, x = (
        argument(combine, "residual_x"),
        argument(combine, "gamma"),
        value_of(argument(combine, "expand_x")),
    )
    if not results:
        raise NotThisForm(combine, "raise.unused", f"no result of {combine.name} is read", "one of them")
    tokens, width = (size_key(value_of(n).shape[at]) for n, at in ((argument(combine, "expert_ids"), 0), (gamma, 0)))
    shape = [*map(size_key, value_of(residual).shape)]
    dtypes = {value_of(each).dtype for each in (residual, gamma)} | {x.dtype}
    if shape != [tokens, 1, size_key(x.shape[-1])] or width != shape[-1] or len(dtypes) != 1:
        seen = f"{combine.name}: residual_x {tuple(value_of(residual).shape)}, gamma {tuple(value_of(gamma).shape)}, {dtypes}"
        raise NotThisForm(combine, "raise.dtype", seen, "[T, 1, H] and [H], of the rows' dtype")
    return Norm(residual, gamma, argument(combine, "norm_eps"), results)


def emit_norm(norm: Norm, emit: Emitter, y: Node) -> list[tuple[Node, Node]]:
    """(result of the operator that was, what stands for it) of y [T, H]."""
    wide = emit.call(torch.ops.aten.unsqueeze.default, y, 1)
    made: Any = emit.call(torch.ops.npu.npu_add_rms_norm.default, norm.residual, wide, norm.gamma, norm.epsilon)
    return [(node, emit.item(made, at)) for at, node in norm.results]
