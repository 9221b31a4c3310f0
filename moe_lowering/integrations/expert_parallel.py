"""transformers' own expert parallelism, with the generic operators: the EP implementation ``moe_lowering``.

    register_expert_parallelism(max_tokens=64)
    model = AutoModelForCausalLM.from_pretrained(
        name, distributed_config=DistributedConfig(tp_size=2, ep_size=2, ep_implementation="moe_lowering")
    )

transformers makes the mesh, shards the experts as DTensors and loads each rank's slice of them; a block's tokens then go through
``moe_experts`` and are lowered like any other. Every rank of the TP group holds the same tokens, which is what transformers'
own implementations assume too. Source: transformers.expert_parallel: ``EPImplementation``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moe_lowering.argument_checks import require_integer
from moe_lowering.deployment import Deployment
from moe_lowering.integrations.expert_gates import ExpertsForm
from moe_lowering.integrations.transformers import form_of, run_experts
from moe_lowering.layers.expert_modules import EXPERTS_IMPLEMENTATION, weight_names

__all__ = ["deployment_of", "register_expert_parallelism"]


def register_expert_parallelism(max_tokens: int, **fields: Any) -> None:
    """Make ``moe_lowering`` an ``ep_implementation`` of transformers' ``DistributedConfig``.

    Args:
        max_tokens: the most tokens of a rank in one call, as of ``Deployment``.
        fields: others of ``Deployment.from_groups``: ``soc``, ``mc2``, ``hccl_buffer_mb``, ... Weights stay as transformers
            stores them, so ``weight_format`` is "nd".

    Raises:
        ImportError: this transformers has no such interface; accepted: 5.23 or newer.
        ValueError: an argument is out of range.
    """
    require_integer("register_expert_parallelism", "max_tokens", max_tokens, 1)
    try:
        from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
    except ImportError as error:
        raise ImportError(
            f"moe_lowering: transformers has no EPImplementationInterface ({error}); accepted: transformers 5.23 or newer, or "
            "moe_lowering.load_experts"
        ) from error

    deployments: dict[Any, Deployment] = {}  # by groups: one communicator for all modules

    class MoeLoweringEP(EPImplementation):
        """The experts of one module, through the generic operators."""

        def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any) -> None:
            super().__init__(experts, ep_mesh, tp_mesh)
            form = _form_or_refusal(experts)
            groups = {"ep": ep_mesh.get_group(), "tp": tp_mesh.get_group() if tp_mesh.size() > 1 else None}
            key = tuple(None if group is None else group.group_name for group in groups.values())
            if key not in deployments:
                deployments[key] = Deployment.from_groups(**groups, max_tokens=max_tokens, **fields)
            self.experts, self.form, self.deployment = experts, form, deployments[key]
            experts.moe_lowering_ep_deployment = self.deployment

        def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            down = getattr(self.experts, weight_names(self.experts)[1])  # [E_local, ...], of the dtype of the experts
            return run_experts(
                self.experts,
                self.form,
                (hidden_states.to(down.dtype), top_k_weights, top_k_index),
                num_experts=down.shape[0] * self.ep_mesh.size(),
                deployment=self.deployment,
            )

    EPImplementationInterface.register(EXPERTS_IMPLEMENTATION, MoeLoweringEP)


def _form_or_refusal(experts: Any) -> ExpertsForm:
    """What the experts of a module compute.

    Raises:
        NotImplementedError: the generic operators do not compute that.
    """
    # form_of refuses modules that transformers has sharded, as this one is
    flag, experts._is_expert_parallel = experts._is_expert_parallel, False
    form = form_of(experts)
    experts._is_expert_parallel = flag
    if form.unrecognised or experts.has_post_expert_norm:
        reason = form.unrecognised or "each expert's output is normalised"
        raise NotImplementedError(
            f"moe_lowering: {type(experts).__name__} is not supported by ep_implementation 'moe_lowering': {reason}; "
            "accepted: ep_implementation='auto'"
        )
    return form


def deployment_of(model: Any) -> Deployment:
    """The deployment of a model that was loaded with ``ep_implementation="moe_lowering"``, for ``MoeLowering`` and options.

    Raises:
        ValueError: the model was not loaded so.
    """
    for module in model.modules():
        found: Deployment | None = getattr(module, "moe_lowering_ep_deployment", None)
        if found is not None:
            return found
    raise ValueError(
        f"deployment_of: {type(model).__name__} has no experts of this EP implementation; accepted: a model loaded with "
        "DistributedConfig(ep_implementation='moe_lowering')"
    )
