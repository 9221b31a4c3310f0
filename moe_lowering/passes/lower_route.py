"""Lower ``route``: to ``npu_moe_gating_top_k`` where its limits allow, to ATen operators otherwise.

The device operator returns weights in the dtype of its input, so logits go in as float32. It documents ``renorm`` 0 only,
and divides by the sum of the selected scores exactly for sigmoid and sqrt-softplus; for softmax the division is emitted
after it. Selection is stable (lower index first) in its reference; the ATen form uses a stable sort for the same reason.
Sources: ops_transformer.gating, op_plugin.gating.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from moe_lowering.deployment import Deployment
from moe_lowering.limits import Violation, check
from moe_lowering.passes.blocks import Route, RouteSpec
from moe_lowering.passes.emission.emitter import Emitter, aten
from moe_lowering.passes.graph.arguments import argument
from moe_lowering.passes.legality import torch_npu_is_loaded
from moe_lowering.passes.quantities import GROUP_SELECT_MODES, NORM_TYPES, route_quantities


def judge_route(spec: RouteSpec, deployment: Deployment) -> list[Violation]:
    """Why ``npu_moe_gating_top_k`` cannot compute this routing; empty when it can."""
    quantities = {**route_quantities(spec), "has_torch_npu": torch_npu_is_loaded()}
    return [
        violation
        for operator in ("gating", "npu_moe_gating_top_k")
        for violation in check(operator, deployment.soc, quantities, versions=deployment.versions)
    ]


def emit_route(route: Route, emit: Emitter, use_gating: bool) -> tuple[Node, Node]:
    """(weights float32, ids int32) in the shape of the generic operator's results."""
    logits, bias = route.logits, route.bias
    with emit.at(route.node, route.node):
        scores_in = emit.cast(emit.rows(logits), torch.float32)
        bias = emit.cast(bias, torch.float32) if bias is not None else None
        weights, ids = (_emit_gating if use_gating else _emit_composition)(emit, route.spec, scores_in, bias)
        shaped = logits if route.raised is None else argument(route.node, "self")
        return emit.like(weights, shaped), emit.like(ids, shaped)


def _emit_gating(emit: Emitter, spec: RouteSpec, logits: Node, bias: Node | None) -> tuple[Node, Node]:
    quantities = route_quantities(spec)
    divide_after = spec.scoring == "softmax" and spec.renormalize
    result = emit.call(
        torch.ops.npu.npu_moe_gating_top_k.default,
        logits,
        spec.top_k,
        bias=bias,
        k_group=spec.topk_groups,
        group_count=spec.num_groups,
        group_select_mode=quantities["group_select_mode"],
        renorm=0,
        norm_type=quantities["norm_type"],
        routed_scaling_factor=1.0 if divide_after else spec.scale,
        eps=spec.epsilon,
    )
    weights, ids = emit.item(result, 0), emit.item(result, 1)
    return (_renormalize(emit, spec, weights) if divide_after else weights), ids


def _emit_composition(emit: Emitter, spec: RouteSpec, logits: Node, bias: Node | None) -> tuple[Node, Node]:
    scores = _scores(emit, spec, logits)
    choice = emit.call(aten.add.Tensor, scores, bias) if bias is not None else scores
    if spec.num_groups > 1:
        choice = _best_groups(emit, spec, choice)
    ids = _top_k(emit, choice, spec.top_k)
    weights = emit.call(aten.gather.default, scores, 1, ids)
    if spec.renormalize:
        weights = _renormalize(emit, spec, weights)
    elif spec.scale != 1.0:
        weights = emit.call(aten.mul.Tensor, weights, spec.scale)
    return weights, emit.cast(ids, torch.int32)


def _scores(emit: Emitter, spec: RouteSpec, logits: Node) -> Node:
    if spec.scoring == "softmax":
        return emit.call(aten._softmax.default, logits, -1, False)
    if spec.scoring == "sigmoid":
        return emit.call(aten.sigmoid.default, logits)
    if spec.scoring == "sqrtsoftplus":
        return emit.call(aten.sqrt.default, emit.call(aten.softplus.default, logits))
    raise ValueError(f"emit_route: scoring is {spec.scoring!r}; accepted: {', '.join(NORM_TYPES)}")


def _best_groups(emit: Emitter, spec: RouteSpec, choice: Node) -> Node:
    """Scores of experts outside the best groups become -inf."""
    size = spec.experts // spec.num_groups
    groups = emit.call(aten.reshape.default, choice, [-1, spec.num_groups, size])
    if spec.group_score == "max":
        score = emit.call(aten.amax.default, groups, [-1])
    elif spec.group_score == "top2_sum":
        top = emit.item(emit.call(aten.topk.default, groups, 2), 0)
        score = emit.call(aten.sum.dim_IntList, top, [-1])
    else:
        raise ValueError(f"emit_route: group_score is {spec.group_score!r}; accepted: {', '.join(GROUP_SELECT_MODES)}")
    best = _top_k(emit, score, spec.topk_groups)
    closed = emit.call(aten.ones_like.default, score, dtype=torch.bool, pin_memory=False)
    closed = emit.call(aten.scatter.value, closed, 1, best, False)
    masked = emit.call(aten.masked_fill.Scalar, groups, emit.call(aten.unsqueeze.default, closed, -1), float("-inf"))
    return emit.call(aten.reshape.default, masked, [-1, spec.experts])


def _top_k(emit: Emitter, scores: Node, k: int) -> Node:
    order = emit.call(aten.sort.stable, scores, stable=True, dim=-1, descending=True)
    return emit.call(aten.slice.Tensor, emit.item(order, 1), 1, 0, k)


def _renormalize(emit: Emitter, spec: RouteSpec, weights: Node) -> Node:
    total = emit.call(aten.sum.dim_IntList, weights, [-1], True)
    if not _epsilon_vanishes(spec):
        total = emit.call(aten.add.Tensor, total, spec.epsilon)
    weights = emit.call(aten.div.Tensor, weights, total)
    return weights if spec.scale == 1.0 else emit.call(aten.mul.Tensor, weights, spec.scale)


def _epsilon_vanishes(spec: RouteSpec) -> bool:
    """Whether adding ``epsilon`` to the sum of the chosen scores gives that sum, bit by bit.

    Proof for softmax without a bias: the largest of E scores is at least 1 / E and is chosen, so the sum is at least
    1 / 2E, rounding included. Half a unit in the last place of a float32 is at least 2^-25 of it, and what is less is
    rounded away. With groups the largest score is chosen where a group's score is its largest; by the sum of two it may
    not be.
    """
    if spec.epsilon == 0.0:
        return True
    takes_largest = not spec.has_bias and (spec.num_groups == 1 or spec.group_score == "max")
    return spec.scoring == "softmax" and takes_largest and spec.epsilon * spec.experts < 2.0**-27
