"""The same replacement by Inductor's pattern matcher: route > dispatch > grouped_mlp > combine becomes the gating
operator and ``dispatch_ffn_combine``, the nodes that the pass itself emits for ``fused_mc2`` (``new_operators`` compares them).

- ``register_replacement``: traces the pattern again for every match to check shapes, so new nodes have values.
- ``register_graph_pattern``: a hand-written handler; it checks nothing and its new nodes have no values.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from graphs import DEPLOYMENT, Shape, build
from torch._inductor.pattern_matcher import (
    CallFunction,
    KeywordArg,
    Match,
    PatternMatcherPass,
    fwd_only,
    register_graph_pattern,
    register_replacement,
)
from torch.fx import GraphModule

from moe_lowering import MoeLowering

aten, ops, npu = torch.ops.aten, torch.ops.moe_lowering, torch.ops.npu
EPSILON = 1e-20
SHARED = (256, DEPLOYMENT.ep_group, DEPLOYMENT.ep_size, DEPLOYMENT.tp_group, DEPLOYMENT.tp_size, DEPLOYMENT.token_bound)
MLP = ("swiglu", 0.0, 1.702, False)


def max_output_size(shape: Shape) -> int:
    """What the pass passes for it: read from a graph that it lowered."""
    gm = build(Shape(1, symbolic=shape.symbolic))
    MoeLowering(DEPLOYMENT, "fused_mc2")(gm)
    (fused,) = gm.graph.find_nodes(op="call_function", target=ops.dispatch_ffn_combine.default)
    return fused.args[-1]


def replacement_pass(shape: Shape) -> PatternMatcherPass:
    """A pass with one rule of ``register_replacement``."""
    rows = max_output_size(shape)

    def search(logits: Any, x: Any, w13: Any, w2: Any) -> Any:
        weights, ids = ops.route.default(logits, None, shape.top_k, "softmax", True, 1, 1, "max", 1.0)
        sent, scale, counts, handle = ops.dispatch.default(x, None, ids, None, *SHARED, DEPLOYMENT.max_rows)
        y = ops.grouped_mlp.default(sent, scale, counts, [w13], [w2], [], [], *MLP)
        return ops.combine.default(y, weights, ids, handle, None, *SHARED)

    def replace(logits: Any, x: Any, w13: Any, w2: Any) -> Any:
        weights, ids, _ = npu.npu_moe_gating_top_k.default(
            logits.to(torch.float32), shape.top_k, k_group=1, group_count=1, group_select_mode=0, renorm=0, norm_type=0,
            routed_scaling_factor=1.0, eps=EPSILON,
        )  # fmt: skip
        weights = weights / weights.sum(-1, keepdim=True)  # the pass adds no epsilon that changes no bit
        return ops.dispatch_ffn_combine.default(
            x, [w13], [w2], ids, weights, DEPLOYMENT.mc2_group, DEPLOYMENT.ep_size, rows
        )[0]

    matcher = PatternMatcherPass()
    first = build(Shape(1, symbolic=shape.symbolic))
    route, dispatch, mlp = (
        first.graph.find_nodes(op="call_function", target=op.default)[0]
        for op in (ops.route, ops.dispatch, ops.grouped_mlp)
    )
    examples = [n.meta["val"] for n in (route.args[0], dispatch.args[0], mlp.args[3][0], mlp.args[4][0])]
    with examples[0].fake_mode:
        register_replacement(search, replace, examples, fwd_only, matcher)
    return matcher


def handler_pass(shape: Shape) -> PatternMatcherPass:
    """A pass with one hand-written handler."""
    rows = max_output_size(shape)
    logits, x, w13, w2 = (KeywordArg(name) for name in ("logits", "x", "w13", "w2"))
    shared = tuple(SHARED)
    routed = CallFunction(ops.route.default, logits, None, shape.top_k, "softmax", True, 1, 1, "max", 1.0, _users=2)
    weights = CallFunction(operator.getitem, routed, 0)
    ids = CallFunction(operator.getitem, routed, 1, _users=2)
    dispatched = CallFunction(ops.dispatch.default, x, None, ids, None, *shared, DEPLOYMENT.max_rows, _users=4)
    sent, scale, counts, handle = (CallFunction(operator.getitem, dispatched, i) for i in range(4))
    y = CallFunction(ops.grouped_mlp.default, sent, scale, counts, [w13], [w2], [], [], *MLP)
    matcher = PatternMatcherPass()

    @register_graph_pattern(
        CallFunction(ops.combine.default, y, weights, ids, handle, None, *shared), pass_dict=matcher
    )  # type: ignore[arg-type]
    def fuse(match: Match, logits: Any, x: Any, w13: Any, w2: Any) -> None:
        graph, combine = match.graph, match.output_node()
        with graph.inserting_before(combine):
            call = graph.call_function
            gate = call(
                npu.npu_moe_gating_top_k.default, (call(aten._to_copy.default, (logits,), {"dtype": torch.float32}), 8),
                {"k_group": 1, "group_count": 1, "norm_type": 0, "eps": EPSILON},
            )  # fmt: skip
            weight, chosen = (call(operator.getitem, (gate, i)) for i in range(2))
            total = call(aten.sum.dim_IntList, (weight, [-1], True))
            fused = call(
                ops.dispatch_ffn_combine.default,
                (x, [w13], [w2], chosen, call(aten.div.Tensor, (weight, total)), DEPLOYMENT.mc2_group,
                 DEPLOYMENT.ep_size, rows),
            )  # fmt: skip
            combine.replace_all_uses_with(call(operator.getitem, (fused, 0)))
        match.erase_nodes()

    return matcher


def apply(matcher: PatternMatcherPass, gm: GraphModule) -> int:
    """Number of blocks replaced. Inductor recompiles later, so this does not."""
    return matcher.apply(gm.graph)


def new_operators(gm: GraphModule, shape: Shape) -> Counter[str]:
    """What a graph calls that it did not call before, so that all ways are seen to do the same work; a cast has another name
    in a graph that Inductor's decompositions went through. The pass' own asserts, one of each for a graph, do not count."""
    names = [Counter(str(n.target) for n in g.graph.nodes if n.op == "call_function") for g in (gm, build(shape))]
    new = names[0] - names[1]
    new["aten._to_copy.default"] += new.pop("prims.convert_element_type.default", 0)
    return Counter({name: n for name, n in new.items() if "assert_" not in name})
