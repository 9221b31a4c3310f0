"""``shard_experts``: this rank's part of the experts of every MoE module of a model, in the layout of Ascend's operators."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from moe_lowering.argument_checks import require_instance
from moe_lowering.deployment import Deployment
from moe_lowering.layers.expert_modules import (
    deployment_of,
    moe_modules,
    num_experts_of,
    refuse_computed,
    refuse_lists,
    warn_of_other_implementations,
    weight_names,
)
from moe_lowering.layers.moe import MoE
from moe_lowering.model_arguments import check_experts_per_rank


def shard_experts(model: nn.Module, deployment: Deployment) -> nn.Module:
    """Give this rank its block of the experts of every MoE module in ``model``, in place.

    Rank r keeps experts [r * E_local, (r + 1) * E_local). With shared-expert ranks those keep one shared expert each, and
    the routed experts begin at the first rank after them; modules must then be ``MoE`` with as many shared experts.

    Modules are this package's ``MoE`` and the experts modules of transformers (those that have ``num_experts``,
    ``gate_up_proj``, ``down_proj`` and the flags of ``@use_experts_implementation``). Their weights become contiguous
    [E_local, K, N], K before N, which Ascend's grouped matmul wants. Each module gets the attribute
    ``moe_lowering_deployment``; those of transformers also ``moe_lowering_num_experts`` (E on all ranks; their
    ``num_experts`` is left) and ``is_transposed`` = True. Modules that share a parameter share its part
    (``quantise_experts``, which makes parameters of its own for each, comes after this call then). No data is read, so meta
    and fake tensors work. A second call with the same deployment changes nothing. Quantised experts
    (``quantisation.quantise_experts``) are cut with their scales.

    Args:
        model: with all experts on this rank.
        deployment: its ``ep_size`` ranks share the experts; this rank's place is ``ep_rank``, or read from ``ep_group``.

    Returns:
        ``model``.

    Raises:
        ValueError: E is not a multiple of the ranks with routed experts; a module has other shared experts than the
            deployment, was sharded before, for another deployment or by transformers, or holds lists (``list_experts``) or
            weights that are computed; no MoE module found; the deployment contradicts its process groups, or its
            ``ep_rank`` is not known. The model is as it was then.
    """
    targets, deployment = require_shardable("shard_experts", model, deployment)
    parts = _Parts([module for _, module in targets])
    for _, module in targets:
        if deployment_of(module) is None:
            _shard(module, deployment, parts)
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
        shared_experts = module.shared_experts if isinstance(module, MoE) else 0
        check_experts_per_rank(where, num_experts_of(module), shared_experts, deployment)
        if deployment_of(module) == deployment:
            continue
        refuse_lists(where, module)
        refuse_computed(where, module)
        if deployment_of(module) is not None:
            raise ValueError(
                f"{where} was sharded for another deployment; accepted: a whole module, or the same deployment"
            )
        if getattr(module, "_is_expert_parallel", False):
            raise ValueError(
                f"{where} was sharded by transformers; accepted: a model loaded without expert parallelism"
            )
    return targets, deployment


class _Parts:
    """A rank's parts of parameters; of one that several modules hold there is one part, too."""

    def __init__(self, modules: list[nn.Module]) -> None:
        held = [each for module in modules for each in module.parameters(recurse=False)]
        times = Counter(map(id, held))
        self._shared = {
            id(each): each for each in held if times[id(each)] > 1
        }  # no others: a whole one goes when it is cut
        self._made: dict[tuple[Any, ...], nn.Parameter] = {}

    def cut(self, whole: Any, block: slice, transpose: bool) -> nn.Parameter:
        """``block`` of the first dimension; a copy, so that the whole parameter can be freed."""
        key = (id(whole), block.start, block.stop, transpose)
        if key in self._made:
            return self._made[key]
        with torch.no_grad():
            part = whole[block].transpose(1, 2) if transpose else whole[block]
            new = nn.Parameter(part.clone(memory_format=torch.contiguous_format), requires_grad=whole.requires_grad)
        if id(whole) in self._shared:
            self._made[key] = new
        return new


def _shard(module: nn.Module, deployment: Deployment, parts: _Parts) -> None:
    experts: Any = module
    block, source = deployment.own_experts(num_experts_of(module)), ""
    if deployment.shared_expert is not None:
        block, source = slice(deployment.shared_expert, deployment.shared_expert + 1), "shared_"

    def replace(name: str, transpose: bool = False) -> None:
        whole = getattr(module, source + name, None)
        if whole is not None:
            setattr(module, name, parts.cut(whole, block, transpose))

    own = isinstance(module, MoE)
    for name in weight_names(module):
        replace(name, transpose=not own and not experts.is_transposed)
        for beside in ("bias", "scale", "offset", "scale_bias"):
            replace(f"{name}_{beside}")
    if own:
        for name in [name for name, _ in module.named_parameters(recurse=False) if name.startswith("shared_")]:
            module.register_parameter(name, None)
    else:
        experts.is_transposed = True
        experts.moe_lowering_num_experts = num_experts_of(module)
    experts.moe_lowering_deployment = deployment
