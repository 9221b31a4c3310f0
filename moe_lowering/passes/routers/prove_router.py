"""Whether a selection of experts and the weights at it are what ``route`` computes, and with which arguments.

``differs`` says whether, ``spec_of`` with which arguments. The records are explained in ``values``; the notes of
``match_router`` say what stays open among equal scores.
"""

from __future__ import annotations

from torch.fx import Node

from moe_lowering.custom_ops.route import FLOATS
from moe_lowering.custom_ops.sizes import token_count
from moe_lowering.passes.blocks import RouteSpec, shape_key
from moe_lowering.passes.graph.operator_names import call_name
from moe_lowering.passes.routers.values import Groups, Reason, Scores, Selection, Taken, last, val

_LOWEST = -3.38e38  # what is lower is lower than any score with a bias: the least finite bfloat16 and float32


def differs(by: Selection, weighted: Taken, at: Node) -> Reason | None:
    """Why a selection and the weights at it are not what ``route`` computes; None when they are."""
    chosen, weighed = by.scores, weighted.scores
    if chosen.logits is not weighed.logits:
        why = chosen.why or weighed.why
        by_one, by_other = call_name(chosen.logits), call_name(weighed.logits)
        another = "another " if by_one == by_other else ""
        seen = f"experts are chosen by {by_one} and weighted by {another}{by_other}"
        return why or Reason("router.other_scores", at, seen, "the same logits for both")
    by_logits = not chosen.scoring
    if not weighed.scoring:
        return chosen.why or Reason(
            "router.no_scores", at, "the weights are logits", "their softmax, sigmoid or sqrt(softplus)"
        )
    if by_logits and (weighed.scoring != "softmax" or chosen.bias is not None or chosen.groups is not None):
        seen = f"experts are chosen by logits and weighted by their {weighed.scoring}"
        return Reason("router.saturates", at, seen, "experts chosen by the scores that weigh them")
    if not by_logits and chosen.scoring != weighed.scoring:
        seen = f"experts are chosen by {chosen.scoring} and weighted by {weighed.scoring}"
        return Reason("router.other_scores", at, seen, "the same scores for both")
    if weighed.bias is not None:
        return Reason("router.biased_weights", at, "the bias is in the weights too", "a bias for the choice alone")
    rounded = chosen.rounded or weighed.rounded
    if rounded is not None:
        seen = f"scores are rounded to {str(rounded).removeprefix('torch.')} before experts are chosen"
        return Reason("router.rounded_scores", at, seen, "scores in float32; weights may be rounded at the end")
    if weighed.groups is not None and weighed.groups != chosen.groups:
        return Reason("router.group_scores", at, "weights are dropped by other groups", "the groups of the choice")
    return _fill_differs(by, at) or _sizes_differ(by, at)


def _fill_differs(by: Selection, at: Node) -> Reason | None:
    scores = by.scores
    if scores.groups is None:
        return None
    if scores.fill <= _LOWEST or (scores.fill <= 0.0 and scores.bias is None):
        return None
    seen = f"experts of other groups have the score {scores.fill:g}" + (
        " and a bias" if scores.bias is not None else ""
    )
    return Reason("router.mask_value", at, seen, "-inf; without a bias also 0, as no score is negative")


def _sizes_differ(by: Selection, at: Node) -> Reason | None:
    """What ``route`` does not accept."""
    scores, value = by.scores, val(by.scores.logits)
    width = last(scores.logits)
    if width is None or value is None or value.dtype not in FLOATS:
        seen = f"logits are {None if value is None else (tuple(value.shape), value.dtype)}"
        return Reason("router.logits", scores.logits, seen, "float32, float16 or bfloat16 [..., E] with a fixed E")
    bias = val(scores.bias)
    if bias is not None and bias.dtype not in FLOATS:
        return Reason("router.bias_dtype", at, f"the bias is {bias.dtype}", "float32, float16 or bfloat16")
    groups = _groups(scores)
    each = width[0] // groups.count
    if not 1 <= by.k <= groups.kept * each or width[0] % groups.count:
        seen = f"{by.k} of {width[0]} experts, {groups.kept} of {groups.count} groups"
        return Reason("router.sizes", at, seen, "no more experts than the groups have that stay")
    return None


def _groups(scores: Scores) -> Groups:
    """The groups of ``route``: all in one where none is dropped."""
    groups = scores.groups
    return groups if groups is not None and groups.kept < groups.count else Groups(1, 1, "max")


def spec_of(weighted: Taken) -> RouteSpec:
    """What ``route`` is to compute for weights that do not differ."""
    scores, logits = weighted.by.scores, val(weighted.by.scores.logits)
    assert logits is not None
    groups, bias = _groups(scores), val(scores.bias)
    return RouteSpec(
        rows=token_count(logits.shape),
        experts=int(logits.shape[-1]),
        top_k=weighted.by.k,
        scoring=weighted.scores.scoring,
        renormalize=weighted.renormalised,
        num_groups=groups.count,
        topk_groups=groups.kept,
        group_score=groups.score,
        scale=1.0 if weighted.scale is None else weighted.scale,
        has_bias=scores.bias is not None,
        key=(shape_key(logits), None if bias is None else shape_key(bias)),
        epsilon=weighted.epsilon,
    )
