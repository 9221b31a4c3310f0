"""``MoE``: a mixture-of-experts layer that is written with the generic operators."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_lowering.deployment import Deployment
from moe_lowering.functional import moe_experts, route
from moe_lowering.model_arguments import check_experts_per_rank, check_layer, check_layer_call, check_layer_place
from moe_lowering.vocabulary import ACTIVATIONS


class MoE(nn.Module):
    """A router and its experts: y = sum over the k chosen experts of weight * expert(x).

    Args:
        hidden_size, intermediate_size: H and I.
        num_experts, top_k: E, on all ranks, and k.
        selection_bias: have a buffer ``selection_bias`` [E] float32, which ``route`` adds to choose experts.
        scoring, renormalize, num_groups, topk_groups, group_score, scale: as for ``functional.route``.
        activation, limit, alpha, interleaved: as for ``functional.moe_experts``.
        expert_bias: have ``w13_bias`` [E_local, 2I] and ``w2_bias`` [E_local, H].
        shared_experts: n shared experts of width I, whose results are added with weight 1, for a deployment with
            ``shared_expert_ranks``. Other shared experts are a module of their own, beside this one.
        deployment: make only this rank's experts, for these groups; all experts on one rank when None. A whole layer
            can be cut later with ``shard_experts``.

    Parameters, none of which asks for a gradient: ``gate.weight`` [E, H], ``w13`` [E_local, H, 2I], ``w2``
    [E_local, I, H]. A whole layer with shared experts has them as ``shared_w13`` [n, H, 2I] and ``shared_w2`` [n, I, H] and
    cannot be run; once it is cut, w13 and w2 of a shared-expert rank are those of its shared expert.
    ``quantisation.quantise_experts`` changes the dtypes of w13 and w2, and adds their scales.
    """

    w13: Tensor
    w2: Tensor
    w13_bias: Tensor | None
    w2_bias: Tensor | None
    w13_scale: Tensor | None
    w2_scale: Tensor | None
    w13_offset: Tensor | None
    w2_offset: Tensor | None
    w13_scale_bias: Tensor | None
    w2_scale_bias: Tensor | None
    selection_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        selection_bias: bool = False,
        scoring: str = "softmax",
        renormalize: bool = True,
        num_groups: int = 1,
        topk_groups: int = 1,
        group_score: str = "top2_sum",
        scale: float | None = None,
        activation: str = "swiglu",
        limit: float | None = None,
        alpha: float | None = None,
        interleaved: bool = False,
        expert_bias: bool = False,
        shared_experts: int = 0,
        deployment: Deployment | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_layer(
            sizes={
                "hidden_size": hidden_size,
                "intermediate_size": intermediate_size,
                "num_experts": num_experts,
                "num_groups": num_groups,
                "topk_groups": topk_groups,
            },
            top_k=top_k,
            shared_experts=shared_experts,
            flags={
                "selection_bias": selection_bias,
                "renormalize": renormalize,
                "interleaved": interleaved,
                "expert_bias": expert_bias,
            },
            numbers={"scale": scale, "limit": limit, "alpha": alpha},
            words={"scoring": scoring, "group_score": group_score, "activation": activation},
        )
        check_layer_place(deployment, dtype, device)
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.scoring, self.renormalize = scoring, renormalize
        self.num_groups, self.topk_groups, self.group_score = num_groups, topk_groups, group_score
        self.activation, self.interleaved = activation, interleaved
        self._factors = scale, limit, alpha  # dynamo takes floats in a module's tuple as constants (see functional.py)
        deployment = None if deployment is None else deployment.placed()
        self.moe_lowering_deployment = deployment
        self.moe_lowering_quantisation = "none"
        self.shared_experts = shared_experts
        local, shared = num_experts, shared_experts
        if deployment is not None:
            check_experts_per_rank("MoE", num_experts, shared_experts, deployment)
            local, shared = 1 if deployment.on_shared_rank else num_experts // deployment.routed_ranks, 0
        self.gate = nn.Linear(hidden_size, num_experts, bias=False, dtype=dtype, device=device).requires_grad_(False)
        widths = {"w13": (hidden_size, ACTIVATIONS[activation].parts * intermediate_size)}
        widths["w2"] = (intermediate_size, hidden_size)
        for name, (inputs, outputs) in widths.items():
            self._register_weights(name, torch.empty(local, inputs, outputs, dtype=dtype, device=device), expert_bias)
            if shared:
                weights = torch.empty(shared, inputs, outputs, dtype=dtype, device=device)
                self._register_weights(f"shared_{name}", weights, expert_bias)
        zeros = torch.zeros(num_experts, dtype=torch.float32, device=device) if selection_bias else None
        self.register_buffer("selection_bias", zeros)
        self._check_words()
        self.reset_parameters()

    def _register_weights(self, name: str, weights: Tensor, has_bias: bool) -> None:
        """``weights`` [experts, K, N], not yet initialised, with what belongs to them: a bias [experts, N], and what only
        quantised weights have, which is None."""
        self.register_parameter(name, nn.Parameter(weights, requires_grad=False))
        bias = nn.Parameter(torch.empty_like(weights[:, 0]), requires_grad=False) if has_bias else None
        self.register_parameter(f"{name}_bias", bias)
        for quantised in ("scale", "offset", "scale_bias"):
            self.register_parameter(f"{name}_{quantised}", None)

    def _check_words(self) -> None:
        """What the operators refuse of the router's and the experts' arguments they refuse here, before the first call."""
        scale, limit, alpha = self._factors
        logits = torch.empty(1, self.num_experts, dtype=torch.float32, device="meta")
        route(
            logits,
            self.top_k,
            scoring=self.scoring,
            num_groups=self.num_groups,
            topk_groups=self.topk_groups,
            group_score=self.group_score,
            scale=scale,
        )
        x, w13, w2 = (
            torch.empty(shape, dtype=torch.float32, device="meta")
            for shape in ((1, 8), (1, 8, 8 * ACTIVATIONS[self.activation].parts), (1, 8, 8))
        )
        weights, ids = x[:, :1], torch.zeros(1, 1, dtype=torch.int32, device="meta")
        gate, interleaved = self.activation, self.interleaved
        moe_experts(x, weights, ids, w13, w2, activation=gate, limit=limit, alpha=alpha, interleaved=interleaved)

    def reset_parameters(self) -> None:
        """Normal weights of standard deviation 1 / sqrt(inputs), zero biases."""
        for name, tensor in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                nn.init.zeros_(tensor)
            else:
                nn.init.normal_(tensor, std=tensor.shape[1] ** -0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """y [..., H] for x [..., H] of the weights' dtype; tokens whose bool ``mask`` [...] is False give zero."""
        first = self.w13 if isinstance(self.w13, Tensor) else self.w13[0]  # ``list_experts`` makes a list of it
        check_layer_call(x, mask, self.hidden_size, first, self.gate)
        scale, limit, alpha = self._factors
        if self.shared_experts and self.moe_lowering_deployment is None:
            raise ValueError(
                f"MoE: shared_experts is {self.shared_experts} and no deployment is given; accepted: a layer that "
                "shard_experts cut for a deployment with shared_expert_ranks"
            )
        weights, ids = route(
            self.gate(x),
            self.top_k,
            bias=self.selection_bias,
            scoring=self.scoring,
            renormalize=self.renormalize,
            num_groups=self.num_groups,
            topk_groups=self.topk_groups,
            group_score=self.group_score,
            scale=scale,
        )
        return moe_experts(
            x,
            weights,
            ids,
            self.w13,
            self.w2,
            num_experts=self.num_experts,
            w13_bias=self.w13_bias,
            w2_bias=self.w2_bias,
            activation=self.activation,
            limit=limit,
            alpha=alpha,
            interleaved=self.interleaved,
            mask=mask,
            deployment=self.moe_lowering_deployment,
            quantisation=self.moe_lowering_quantisation,
            w13_scale=self.w13_scale,
            w2_scale=self.w2_scale,
            w13_offset=self.w13_offset,
            w2_offset=self.w2_offset,
            w13_scale_bias=self.w13_scale_bias,
            w2_scale_bias=self.w2_scale_bias,
        )

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}, activation={self.activation}"
