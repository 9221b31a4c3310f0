"""How a model is written with the generic operators: two functions that trace to ``torch.ops.moe_lowering.*``.

Float arguments default to None: with ``dynamic=True`` dynamo turns a float default, like a float attribute, into an
input of the graph, finds that an operator wants it as a constant, and calls the backend a second time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lowering import custom_ops as _custom_ops  # registers the operators
from moe_lowering.deployment import Deployment

__all__ = ["moe_experts", "route"]

_ops = torch.ops.moe_lowering
_SINGLE_RANK = Deployment()
assert _custom_ops


def route(
    logits: Tensor,
    top_k: int,
    *,
    bias: Tensor | None = None,
    scoring: str = "softmax",
    renormalize: bool = True,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "top2_sum",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose ``top_k`` experts for each token.

    Args:
        logits: router scores [..., E], float32, float16 or bfloat16; computed with in float32.
        bias: [E], added to the scores to choose experts, not to their weights (DeepSeek-V3's correction bias).
        scoring: ``softmax``, ``sigmoid`` or ``sqrtsoftplus``.
        renormalize: divide a token's weights by their sum.
        num_groups, topk_groups, group_score: keep the best ``topk_groups`` of ``num_groups`` equal groups of experts,
            by their largest score (``max``) or by the sum of the two largest (``top2_sum``).
        scale: factor of the weights; 1 when None.

    Returns:
        weights [..., top_k] float32 and ids [..., top_k] int32, largest first; the lower id first among equals.

    Raises:
        ValueError, TypeError: an argument out of range, with its value and what is accepted.
    """
    factor = 1.0 if scale is None else scale
    return _ops.route.default(logits, bias, top_k, scoring, renormalize, num_groups, topk_groups, group_score, factor)


def moe_experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    w13: Tensor | Sequence[Tensor],
    w2: Tensor | Sequence[Tensor],
    *,
    num_experts: int | None = None,
    w13_bias: Tensor | Sequence[Tensor] | None = None,
    w2_bias: Tensor | Sequence[Tensor] | None = None,
    activation: str = "swiglu",
    limit: float | None = None,
    alpha: float | None = None,
    interleaved: bool = False,
    mask: Tensor | None = None,
    deployment: Deployment | None = None,
) -> Tensor:
    """Send tokens to their experts, run the experts, and sum the weighted results: dispatch, grouped_mlp, combine.

    Args:
        x: tokens [..., H], float32, float16 or bfloat16.
        weights, ids: [..., k]; cast to float32 and int32. Ids of one token are distinct.
        w13: gate and up projection of this rank's experts, [E_local, H, 2I] or E_local tensors [H, 2I].
        w2: down projection, [E_local, I, H] or E_local tensors [I, H].
        num_experts: experts on all ranks; E_local * ep_size when None.
        w13_bias, w2_bias: [E_local, 2I] and [E_local, H], or lists.
        activation, limit, alpha, interleaved: see ``docs/architecture.md``. ``limit`` (none: 0 or None) is for
            ``swiglu_clamp`` and ``swiglu_oai``, ``alpha`` (1.702 when None) for ``swiglu_oai``; ``interleaved`` says
            that w13's columns alternate gate and up.
        mask: [...] bool; tokens with False are not sent, and their result is zero.
        deployment: groups and bounds; one rank when None.

    Returns:
        y [..., H] of x's dtype, complete on every rank of the TP group.

    Raises:
        ValueError, TypeError: an argument out of range, with its value and what is accepted.
        RuntimeError: a rank receives more rows than ``deployment.max_rows`` (CPU only).
    """
    place = _SINGLE_RANK if deployment is None else deployment
    w13, w2 = _as_list(w13), _as_list(w2)
    if num_experts is None:
        local = w13[0].shape[0] if len(w13) == 1 and w13[0].dim() == 3 else len(w13)
        num_experts = local * place.ep_size
    weights, ids = weights.to(torch.float32), ids.to(torch.int32)
    rows, row_scale, counts, handle = _ops.dispatch.default(
        x, None, ids, mask, num_experts, place.ep_group, place.ep_size, place.tp_group, place.tp_size,
        place.token_bound, place.max_rows,
    )  # fmt: skip
    rows = _ops.grouped_mlp.default(
        rows, row_scale, counts, w13, w2, _as_list(w13_bias), _as_list(w2_bias), activation,
        0.0 if limit is None else limit, 1.702 if alpha is None else alpha, interleaved,
    )  # fmt: skip
    return _ops.combine.default(
        rows, weights, ids, handle, mask, num_experts, place.ep_group, place.ep_size, place.tp_group, place.tp_size,
        place.token_bound,
    )  # fmt: skip


def _as_list(tensors: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    if tensors is None:
        return []
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)
