"""``MoE``, a mixture-of-experts layer, and ``shard_experts``, which gives a rank its part of a model's experts. Inference only.

Here is also how the package finds the MoE modules of a model (``moe_modules``), its own and those of transformers.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_lowering.argument_checks import require_instance
from moe_lowering.deployment import Deployment
from moe_lowering.functional import moe_experts, route
from moe_lowering.model_arguments import check_layer, check_layer_call, check_layer_place
from moe_lowering.vocabulary import ACTIVATIONS

__all__ = ["MoE", "shard_experts"]

EXPERTS_IMPLEMENTATION = "moe_lowering"  # this package's name among transformers' experts implementations


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
        width = ACTIVATIONS[activation].parts * intermediate_size
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
            _check_sizes("MoE", self, deployment)
            local, shared = 1 if deployment.on_shared_rank else num_experts // deployment.routed_ranks, 0

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.gate = nn.Linear(hidden_size, num_experts, bias=False, dtype=dtype, device=device).requires_grad_(False)
        shapes = {"w13": (hidden_size, width), "w2": (intermediate_size, hidden_size)}
        for name, (inputs, outputs) in shapes.items():
            for prefix, experts in (("", local), *((("shared_", shared),) if shared else ())):
                self.register_parameter(f"{prefix}{name}", parameter(experts, inputs, outputs))
                bias = parameter(experts, outputs) if expert_bias else None
                self.register_parameter(f"{prefix}{name}_bias", bias)
                for beside in ("scale", "offset", "scale_bias"):
                    self.register_parameter(f"{prefix}{name}_{beside}", None)
        zeros = torch.zeros(num_experts, dtype=torch.float32, device=device) if selection_bias else None
        self.register_buffer("selection_bias", zeros)
        self._check_words()
        self.reset_parameters()

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
        check_layer_call(x, mask, self.hidden_size)
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


def shard_experts(model: nn.Module, deployment: Deployment) -> nn.Module:
    """Give this rank its block of the experts of every MoE module in ``model``, in place.

    Rank r keeps experts [r * E_local, (r + 1) * E_local). With shared-expert ranks those keep one shared expert each, and
    the routed experts begin at the first rank after them; modules must then be ``MoE`` with as many shared experts.

    Modules are this package's ``MoE`` and the experts modules of transformers (those that have ``num_experts``,
    ``gate_up_proj``, ``down_proj`` and the flags of ``@use_experts_implementation``). Their weights become contiguous
    [E_local, K, N], K before N, which Ascend's grouped matmul wants. Each module gets the attribute
    ``moe_lowering_deployment``; those of transformers also ``moe_lowering_num_experts`` (E on all ranks; their
    ``num_experts`` is left) and ``is_transposed`` = True. No data is read, so meta and fake tensors work. A second call
    with the same deployment changes nothing. Quantised experts (``quantisation.quantise_experts``) are cut with their
    scales.

    Args:
        model: with all experts on this rank.
        deployment: its ``ep_size`` ranks share the experts; this rank's place is ``ep_rank``, or read from ``ep_group``.

    Returns:
        ``model``.

    Raises:
        ValueError: E is not a multiple of the ranks with routed experts; a module has other shared experts than the
            deployment, was sharded before, for another deployment or by transformers, or holds lists (``list_experts``);
            no MoE module found; the deployment contradicts its process groups, or its ``ep_rank`` is not known. The model is
            as it was then.
    """
    targets, deployment = require_shardable("shard_experts", model, deployment)
    for _, module in targets:
        if _deployment_of(module) is None:
            _shard(module, deployment)
    warn_of_other_implementations("shard_experts", targets)
    return model


def require_shardable(
    what: str, model: nn.Module, deployment: Deployment
) -> tuple[list[tuple[str, nn.Module]], Deployment]:
    """The MoE modules and the deployment with this rank's place; raises what ``shard_experts`` would, and changes nothing."""
    targets = moe_modules(what, model)
    require_instance(what, "deployment", deployment, Deployment, "a moe_lowering.Deployment")
    deployment = deployment.placed()
    deployment.own_rank("ep")
    for name, module in targets:  # first all checks, so that an error leaves the model as it was
        where = f"{what}: {name or type(module).__name__}"
        _check_sizes(where, module, deployment)
        if _deployment_of(module) == deployment:
            continue
        refuse_lists(where, module)
        if _deployment_of(module) is not None:
            raise ValueError(
                f"{where} was sharded for another deployment; accepted: a whole module, or the same deployment"
            )
        if getattr(module, "_is_expert_parallel", False):
            raise ValueError(
                f"{where} was sharded by transformers; accepted: a model loaded without expert parallelism"
            )
    return targets, deployment


def moe_modules(what: str, model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of every ``MoE`` and every experts module of transformers; a ValueError when there is none."""
    require_instance(what, "model", model, nn.Module, "a torch.nn.Module")
    modules = list(model.named_modules())
    matches = [(name, module) for name, module in modules if isinstance(module, MoE) or is_experts_module(module)]
    if not matches:
        raise ValueError(
            f"{what}: {type(model).__name__} has no MoE module; accepted: a model with moe_lowering.layers.MoE "
            "or with transformers' experts modules (num_experts, gate_up_proj or up_proj, down_proj, is_transposed, has_bias, "
            "is_concatenated)"
        )
    return matches


def warn_of_other_implementations(what: str, modules: Sequence[tuple[str, nn.Module]]) -> None:
    """Say so where transformers' modules are not computed by this package, which alone can read what they now hold."""
    others: dict[str, list[str]] = {}
    for name, module in modules:
        implementation = getattr(getattr(module, "config", None), "_experts_implementation", EXPERTS_IMPLEMENTATION)
        if implementation != EXPERTS_IMPLEMENTATION:
            others.setdefault(str(implementation), []).append(name or type(module).__name__)
    for implementation, names in others.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.warn(
            f"{what}: {names[0]}{more} is computed by the experts implementation {implementation!r}, which does not read experts "
            f"as they are now and is not lowered; call model.set_experts_implementation({EXPERTS_IMPLEMENTATION!r}) "
            "(moe_lowering.integrations.transformers.register() first)",
            stacklevel=3,
        )


def refuse_lists(what: str, module: nn.Module) -> None:
    """A ValueError for experts that ``experts.list_experts`` made lists of."""
    if any(isinstance(getattr(module, name, None), nn.ParameterList) for name in weight_names(module)):
        raise ValueError(f"{what} holds one tensor for each expert; accepted: stacked experts (call list_experts last)")


def is_experts_module(module: nn.Module) -> bool:
    """Whether a module is an experts module of transformers, by its attributes."""
    names = ("num_experts", "down_proj", "is_transposed", "has_bias", "is_concatenated")
    return all(hasattr(module, name) for name in names) and hasattr(module, weight_names(module)[0])


def weight_names(module: nn.Module) -> tuple[str, str]:
    """The attributes that hold the experts' weights, before and after the activation."""
    if isinstance(module, MoE):
        return "w13", "w2"
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj"


def _experts_of(module: nn.Module) -> int:
    known: Any = module  # two families of modules with the same attribute
    return int(known.num_experts)


def _deployment_of(module: nn.Module) -> Deployment | None:
    return getattr(module, "moe_lowering_deployment", None)


def _check_sizes(what: str, module: nn.Module, deployment: Deployment) -> None:
    experts, ranks = _experts_of(module), deployment.routed_ranks
    if experts % ranks:
        name = "ep_size - shared_expert_ranks" if deployment.shared_expert_ranks else "ep_size"
        raise ValueError(f"{what}: num_experts is {experts}; accepted: a multiple of {name}, {ranks}")
    expected = deployment.shared_experts if deployment.shared_expert_ranks else 0
    has = module.shared_experts if isinstance(module, MoE) else 0
    if has != expected:
        raise ValueError(
            f"{what}: shared_experts is {has}; accepted: {expected}, as the deployment has {deployment.shared_expert_ranks} "
            "shared-expert ranks (modules of transformers hold no shared experts: write the layer as MoE)"
        )


def _shard(module: nn.Module, deployment: Deployment) -> None:
    experts: Any = module
    block, source = deployment.own_experts(_experts_of(module)), ""
    if deployment.shared_expert is not None:
        block, source = slice(deployment.shared_expert, deployment.shared_expert + 1), "shared_"
    own = isinstance(module, MoE)
    for name in weight_names(module):
        _replace(module, name, source, block, transpose=not own and not experts.is_transposed)
        for beside in ("bias", "scale", "offset", "scale_bias"):
            _replace(module, f"{name}_{beside}", source, block, transpose=False)
    if own:
        for name in [name for name, _ in module.named_parameters(recurse=False) if name.startswith("shared_")]:
            module.register_parameter(name, None)
    else:
        experts.is_transposed = True
        experts.moe_lowering_num_experts = _experts_of(module)
    experts.moe_lowering_deployment = deployment


def _replace(module: nn.Module, name: str, source: str, block: slice, *, transpose: bool) -> None:
    """Cut a parameter in its first dimension; a copy, so that the whole parameter can be freed. ``source`` is a prefix."""
    old = getattr(module, source + name, None)
    if old is None:
        return
    with torch.no_grad():
        part = old[block].transpose(1, 2) if transpose else old[block]
        new = part.clone(memory_format=torch.contiguous_format)
    setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
