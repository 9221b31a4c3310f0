"""``route``: scores of a router to the k experts of each token and their weights.

Meaning: CANN's ``aclnnMoeGatingTopK`` (``npu_moe_gating_top_k``). In float32, p = softmax, sigmoid or sqrt(softplus) of
the logits; v = p + bias decides which experts are taken and nothing else. With groups, the ``topk_groups`` groups with
the best score (largest v, or the sum of the two largest) stay and the others are -inf. ids = the k largest v, the lower
index first among equals; weights = p at ids, divided by their sum + ``epsilon`` (1e-20) if ``renormalize``, times ``scale``.
"""

from __future__ import annotations

import math
from typing import Generic

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import NamedTuple

from moe_lowering.custom_ops.library import Value, check_once, register, schema_of
from moe_lowering.custom_ops.sizes import are_certainly_different, is_known, show

SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
GROUP_SCORES = ("max", "top2_sum")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
EPSILON = 1e-20


class RouteCall(NamedTuple, Generic[Value]):
    """The arguments of ``route``: logits [..., E], a bias [E] for the choice, and how to choose; see the top of this file."""

    logits: Value
    bias: Value | None
    top_k: int
    scoring: str
    renormalize: bool
    num_groups: int
    topk_groups: int
    group_score: str
    scale: float
    epsilon: float = EPSILON


NAME = "route"
SCHEMA = schema_of(NAME, RouteCall, "(Tensor weights, Tensor ids)")


def _check(call: RouteCall[Tensor]) -> None:
    logits, bias, top_k = call.logits, call.bias, call.top_k
    num_groups, topk_groups, group_score = call.num_groups, call.topk_groups, call.group_score
    if logits.dim() < 1:
        raise ValueError("route: logits has no dimension; accepted: [..., num_experts]")
    if logits.dtype not in FLOATS:
        raise TypeError(f"route: logits is {logits.dtype}; accepted: float32, float16, bfloat16")
    experts = logits.shape[-1]
    if bias is not None:
        if are_certainly_different(bias.shape, (experts,)):
            raise ValueError(f"route: bias has shape {show(bias.shape)}; accepted: {show((experts,))}, one per expert")
        if bias.dtype not in FLOATS:
            raise TypeError(f"route: bias is {bias.dtype}; accepted: float32, float16, bfloat16")
    if call.scoring not in SCORINGS:
        raise ValueError(f"route: scoring is {call.scoring!r}; accepted: {', '.join(SCORINGS)}")
    if group_score not in GROUP_SCORES:
        raise ValueError(f"route: group_score is {group_score!r}; accepted: {', '.join(GROUP_SCORES)}")
    if not math.isfinite(call.scale):
        raise ValueError(f"route: scale is {call.scale}; accepted: a finite number")
    if not (math.isfinite(call.epsilon) and call.epsilon >= 0):
        raise ValueError(f"route: epsilon is {call.epsilon}; accepted: a finite number, 0 or more")
    if top_k < 1 or is_known(top_k > experts):
        raise ValueError(f"route: top_k is {top_k}; accepted: 1 to {experts}, the number of experts")
    if num_groups < 1 or is_known(experts % num_groups != 0):
        raise ValueError(f"route: num_groups is {num_groups}; accepted: a divisor of {experts}, the number of experts")
    if not 1 <= topk_groups <= num_groups:
        raise ValueError(f"route: topk_groups is {topk_groups}; accepted: 1 to num_groups, {num_groups}")
    if is_known(top_k * num_groups > topk_groups * experts):
        raise ValueError(
            f"route: top_k is {top_k}; accepted: at most topk_groups * experts per group, "
            f"{topk_groups} * {experts // num_groups}"
        )
    if num_groups > 1 and group_score == "top2_sum" and is_known(experts < 2 * num_groups):
        raise ValueError(
            "route: group_score is 'top2_sum' with 1 expert per group; accepted: 'max', or 2 or more experts"
        )


def _fake(call: RouteCall[Tensor]) -> tuple[Tensor, Tensor]:
    _check(call)
    shape = (*call.logits.shape[:-1], call.top_k)
    return call.logits.new_empty(shape, dtype=torch.float32), call.logits.new_empty(shape, dtype=torch.int32)


def _cpu(call: RouteCall[Tensor]) -> tuple[Tensor, Tensor]:
    check_once(_check, call)
    scores = _score(call.logits.float(), call.scoring)
    choice = scores if call.bias is None else scores + call.bias.float()
    if call.num_groups > 1:
        choice = _keep_best_groups(choice, call.num_groups, call.topk_groups, call.group_score)
    ids = stable_top_k(choice, call.top_k)
    weights = scores.gather(-1, ids)
    if call.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + call.epsilon)
    return weights * call.scale, ids.to(torch.int32)


def _score(logits: Tensor, scoring: str) -> Tensor:
    if scoring == "softmax":
        return torch.softmax(logits, -1)
    if scoring == "sigmoid":
        return torch.sigmoid(logits)
    if scoring == "sqrtsoftplus":
        return F.softplus(logits).sqrt()
    raise ValueError(f"route: scoring is {scoring!r}, which has no kernel")


def _keep_best_groups(choice: Tensor, num_groups: int, topk_groups: int, group_score: str) -> Tensor:
    grouped = choice.reshape(*choice.shape[:-1], num_groups, choice.shape[-1] // num_groups)
    best = _group_scores(grouped, group_score)
    dropped = torch.ones_like(best, dtype=torch.bool)
    dropped.scatter_(-1, stable_top_k(best, topk_groups), False)
    return grouped.masked_fill(dropped.unsqueeze(-1), -torch.inf).flatten(-2)


def _group_scores(grouped: Tensor, group_score: str) -> Tensor:
    if group_score == "max":
        return grouped.amax(-1)
    if group_score == "top2_sum":
        return grouped.topk(2, dim=-1).values.sum(-1)
    raise ValueError(f"route: group_score is {group_score!r}, which has no kernel")


def stable_top_k(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest of float32 ``values`` along the last dimension, the lower index first among equals.

    ``torch.topk`` leaves the order of equals open, and a stable sort takes three times as long. Here topk sees distinct
    int64 keys: the float's bits made to order as an integer, then the index counted from the end.
    """
    bits = (values + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    last = values.shape[-1] - 1
    from_end = torch.arange(last, -1, -1, device=values.device)
    keys = torch.topk((ordered << 32) | from_end, k, dim=-1).values
    return last - (keys & 0xFFFFFFFF)


register(SCHEMA, RouteCall, cpu=_cpu, fake=_fake)
