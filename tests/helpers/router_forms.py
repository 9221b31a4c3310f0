"""Routers as models write them: functions of logits [T, E] and a bias [E] that give weights [T, k] and ids [T, k]."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EXPERTS, TOP_K, GROUPS, KEPT = 32, 4, 4, 2
Routed = tuple[Tensor, ...]
Router = Callable[[Tensor, Tensor], Routed]


def renormalised(weights: Tensor, epsilon: float = 0.0) -> Tensor:
    return weights / (weights.sum(-1, keepdim=True) + epsilon if epsilon else weights.sum(-1, keepdim=True))


def best_groups(choice: Tensor, score: str = "top2_sum", kept: int = KEPT) -> Tensor:
    """[T, E] bool: experts of the best groups."""
    grouped = choice.view(-1, GROUPS, EXPERTS // GROUPS)
    scores = grouped.topk(2, -1)[0].sum(-1) if score == "top2_sum" else grouped.max(-1).values
    ids = torch.topk(scores, kept, -1, sorted=False)[1]
    mask = torch.zeros_like(scores).scatter_(1, ids, 1)
    return mask.unsqueeze(-1).expand(-1, GROUPS, EXPERTS // GROUPS).reshape(-1, EXPERTS).bool()


def softmax_first(logits: Tensor, bias: Tensor) -> Routed:
    return F.softmax(logits, dim=-1, dtype=torch.float).topk(TOP_K, -1)


def softmax_renormalised(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = F.softmax(logits.float(), dim=-1).topk(TOP_K, -1)
    weights /= weights.sum(-1, keepdim=True)
    return weights.to(logits.dtype), ids


def top_k_first(logits: Tensor, bias: Tensor) -> Routed:
    values, ids = logits.topk(TOP_K, -1)
    return F.softmax(values, dim=1, dtype=values.dtype), ids


def softmax_of_gathered(logits: Tensor, bias: Tensor) -> Routed:
    ids = (F.softmax(logits.float(), -1) + bias).topk(TOP_K, -1)[1]
    return F.softmax(logits.gather(1, ids).float(), -1), ids


def sigmoid_biased(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().sigmoid()
    ids = (scores + bias).topk(TOP_K, -1, sorted=False)[1]
    return renormalised(scores.gather(1, ids)) * 2.5, ids


def deepseek_v3(logits: Tensor, bias: Tensor, fill: float = float("-inf")) -> Routed:
    scores = logits.float().sigmoid()
    choice = scores + bias.unsqueeze(0)
    ids = choice.masked_fill(~best_groups(choice), fill).topk(TOP_K, -1, sorted=False)[1]
    return renormalised(scores.gather(1, ids), 1e-20) * 2.5, ids


def deepseek_v2(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.softmax(-1, dtype=torch.float32)
    weights, ids = scores.masked_fill(~best_groups(scores, "max"), 0.0).topk(TOP_K, -1, sorted=False)
    return weights * 16.0, ids


def mask_multiplied(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().softmax(-1)
    ids = (scores * best_groups(scores).float()).topk(TOP_K, -1)[1]
    return renormalised(scores.gather(1, ids)), ids


def mask_where(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().sigmoid()
    choice = scores + bias
    ids = torch.where(best_groups(choice, "max"), choice, float("-inf")).topk(TOP_K, -1)[1]
    return renormalised(scores.gather(1, ids), 1e-20), ids


def all_groups(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().sigmoid()
    choice = scores + bias
    ids = choice.masked_fill(~best_groups(choice, kept=GROUPS), 0.0).topk(TOP_K, -1)[1]
    return renormalised(scores.gather(1, ids), 1e-20), ids


def leading_axes(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.view(2, -1, EXPERTS).float().softmax(-1).view(-1, EXPERTS)
    weights, ids = scores.topk(TOP_K, -1)
    return renormalised(weights), ids


def one_expert(logits: Tensor, bias: Tensor) -> Routed:
    return tuple(logits.float().softmax(-1).max(-1, keepdim=True))


def epsilon(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = logits.float().sigmoid().topk(TOP_K, -1)
    return renormalised(weights, 1e-3), ids


@dataclasses.dataclass(frozen=True)
class Form:
    """A router and what it computes, as arguments of ``reference.route``."""

    router: Router
    scoring: str = "softmax"
    renormalize: bool = True
    biased: bool = False
    groups: int = 1
    kept: int = 1
    score: str = "max"
    scale: float = 1.0
    top_k: int = TOP_K
    epsilon: float = 0.0

    def expected(self, logits: Tensor, bias: Tensor) -> tuple[Any, ...]:
        chosen = bias if self.biased else None
        return (
            *(logits, chosen, self.top_k, self.scoring, self.renormalize),
            *(self.groups, self.kept, self.score, self.scale, self.epsilon),
        )


GROUPED: dict[str, Any] = {"groups": GROUPS, "kept": KEPT}
FORMS = {
    "softmax, top-k": Form(softmax_first, renormalize=False),
    "softmax, top-k, renormalised, cast": Form(softmax_renormalised),
    "top-k, softmax": Form(top_k_first),
    "softmax of gathered logits": Form(softmax_of_gathered, biased=True),
    "sigmoid with a bias": Form(sigmoid_biased, "sigmoid", biased=True, scale=2.5),
    "deepseek_v3": Form(deepseek_v3, "sigmoid", biased=True, scale=2.5, score="top2_sum", **GROUPED, epsilon=1e-20),
    "deepseek_v2": Form(deepseek_v2, renormalize=False, scale=16.0, **GROUPED),
    "a mask that is multiplied": Form(mask_multiplied, score="top2_sum", **GROUPED),
    "a mask in where": Form(mask_where, "sigmoid", biased=True, **GROUPED, epsilon=1e-20),
    "all groups": Form(all_groups, "sigmoid", biased=True, epsilon=1e-20),
    "leading axes": Form(leading_axes),
    "one expert": Form(one_expert, renormalize=False, top_k=1),
    "an epsilon that matters": Form(epsilon, "sigmoid", epsilon=1e-3),
}


# ------------------------------------------------------------------------------------- what follows the weights stays


def over_all(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().softmax(-1)
    weights, ids = scores.topk(TOP_K, -1)
    return weights / (2.0 + scores.square().sum(-1, keepdim=True)), ids


def scaled_twice(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = deepseek_v3(logits, bias)
    return weights * 3.0, ids


def scaled_by_expert(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = softmax_renormalised(logits, bias)
    return weights * bias[ids], ids


def divided_by_k(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = top_k_first(logits, bias)
    return weights / TOP_K, ids


def clamped_sum(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().softmax(-1)
    ids = (scores + bias).topk(TOP_K, -1)[1]
    weights = scores.gather(1, ids)
    return weights / weights.sum(-1, keepdim=True).clamp(min=0.3), ids


def with_logits(logits: Tensor, bias: Tensor) -> Routed:
    return (*softmax_renormalised(logits, bias), logits)


def with_scores(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().sigmoid()
    ids = (scores + bias).topk(TOP_K, -1)[1]
    return renormalised(scores.gather(1, ids)), ids, scores


FOLLOWED: dict[str, Router] = {
    function.__name__: function
    for function in (over_all, scaled_twice, scaled_by_expert, divided_by_k, clamped_sum, with_logits, with_scores)
}


# ------------------------------------------------------------------------------------------------------ negative twins


def _biased(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scores = logits.float().sigmoid()
    return scores, scores + bias, (scores + bias).topk(TOP_K, -1)[1]


def biased_weights(logits: Tensor, bias: Tensor) -> Routed:
    _, choice, ids = _biased(logits, bias)
    return renormalised(choice.gather(1, ids)), ids


def another_selection(logits: Tensor, bias: Tensor) -> Routed:
    scores, _, ids = _biased(logits, bias)
    return renormalised(scores.topk(TOP_K, -1)[0]), ids


def another_k(logits: Tensor, bias: Tensor) -> Routed:
    weights, _ = logits.float().softmax(-1).topk(TOP_K + 1, -1)
    return weights[:, :TOP_K], logits.float().softmax(-1).topk(TOP_K, -1)[1]


def over_tokens(logits: Tensor, bias: Tensor) -> Routed:
    return logits.float().softmax(0).topk(TOP_K, -1)


def groups_by_minimum(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().softmax(-1)
    best = scores.view(-1, GROUPS, EXPERTS // GROUPS).amin(-1).topk(KEPT, -1)[1]
    mask = torch.zeros(logits.shape[0], GROUPS).scatter(1, best, 1).unsqueeze(-1).expand(-1, -1, EXPERTS // GROUPS)
    ids = scores.masked_fill(mask.reshape(-1, EXPERTS) == 0, 0.0).topk(TOP_K, -1)[1]
    return renormalised(scores.gather(1, ids)), ids


def worst_groups(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().softmax(-1)
    ids = scores.masked_fill(best_groups(scores), 0.0).topk(TOP_K, -1)[1]
    return renormalised(scores.gather(1, ids)), ids


def groups_without_bias(logits: Tensor, bias: Tensor) -> Routed:
    scores, choice, _ = _biased(logits, bias)
    ids = choice.masked_fill(~best_groups(scores), float("-inf")).topk(TOP_K, -1)[1]
    return renormalised(scores.gather(1, ids)), ids


def zero_with_bias(logits: Tensor, bias: Tensor) -> Routed:
    return deepseek_v3(logits, bias - 1.0, 0.0)


def half_as_fill(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().sigmoid()
    ids = scores.masked_fill(~best_groups(scores), 0.5).topk(TOP_K, -1)[1]
    return renormalised(scores.gather(1, ids)), ids


def rounded_scores(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().softmax(-1).bfloat16()
    ids = (scores + bias.bfloat16()).topk(TOP_K, -1)[1]
    return scores.gather(1, ids), ids


def sigmoid_last(logits: Tensor, bias: Tensor) -> Routed:
    values, ids = logits.float().topk(TOP_K, -1)
    return renormalised(values.sigmoid()), ids


def sigmoid_chosen_by_logits(logits: Tensor, bias: Tensor) -> Routed:
    ids = logits.topk(TOP_K, -1)[1]
    return renormalised(logits.float().sigmoid().gather(1, ids)), ids


def other_scoring(logits: Tensor, bias: Tensor) -> Routed:
    ids = logits.float().sigmoid().topk(TOP_K, -1)[1]
    return logits.float().softmax(-1).gather(1, ids), ids


def other_logits(logits: Tensor, bias: Tensor) -> Routed:
    ids = logits.float().softmax(-1).topk(TOP_K, -1)[1]
    return (logits.float() * 1.5).softmax(-1).gather(1, ids), ids


def bias_of_each_token(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().sigmoid()
    ids = (scores + logits.float().square()).topk(TOP_K, -1)[1]
    return renormalised(scores.gather(1, ids)), ids


def smallest(logits: Tensor, bias: Tensor) -> Routed:
    return logits.float().softmax(-1).topk(TOP_K, -1, largest=False)


def ids_sorted(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = softmax_renormalised(logits, bias)
    return weights, ids.sort(-1).values


def ids_replaced(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = softmax_renormalised(logits, bias)
    return weights, (ids + 1) % EXPERTS


def no_weights(logits: Tensor, bias: Tensor) -> Routed:
    ids = softmax_renormalised(logits, bias)[1]
    return torch.ones(ids.shape), ids


def values_elsewhere(logits: Tensor, bias: Tensor) -> Routed:
    values, ids = logits.topk(TOP_K, -1)
    return F.softmax(values, -1), ids, values * 2


def doubled_scores(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().sigmoid() * 2
    ids = (scores + bias).topk(TOP_K, -1)[1]
    return renormalised(logits.float().sigmoid().gather(1, ids)), ids


def in_float64(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = logits.double().softmax(-1).topk(TOP_K, -1)
    return weights.float(), ids


TWINS: dict[str, tuple[str, Router]] = {
    function.__name__: (code, function)
    for code, function in (
        ("router.biased_weights", biased_weights),
        ("router.two_selections", another_selection),
        ("router.weights", another_k),
        ("router.no_scores", over_tokens),
        ("router.other_scores", groups_by_minimum),
        ("router.group_mask", worst_groups),
        ("router.group_scores", groups_without_bias),
        ("router.mask_value", zero_with_bias),
        ("router.mask_value", half_as_fill),
        ("router.rounded_scores", rounded_scores),
        ("router.saturates", sigmoid_last),
        ("router.saturates", sigmoid_chosen_by_logits),
        ("router.other_scores", other_scoring),
        ("router.other_scores", other_logits),
        ("router.bias_shape", bias_of_each_token),
        ("router.smallest", smallest),
        ("router.no_selection", ids_sorted),
        ("router.no_selection", ids_replaced),
        ("router.weights", no_weights),
        ("router.read_elsewhere", values_elsewhere),
        ("router.other_scores", doubled_scores),
        ("router.no_scores", in_float64),
    )
}
