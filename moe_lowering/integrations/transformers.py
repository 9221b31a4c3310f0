"""Hugging Face transformers: the experts implementation ``moe_lowering``.

    from moe_lowering.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moe_lowering")

Every model whose experts module carries ``@use_experts_implementation`` then computes its experts with
``functional.moe_experts``; router, shared experts and the rest stay as they are. ``capabilities`` says beforehand
which modules of a model can. One that cannot (see ``_read_form``) keeps transformers' ``grouped_mm``, with one warning for
its class; where its experts are spread over ranks that would be wrong, so there it raises.

What a module's gate computes is never guessed: it is transformers' default gate with a known activation, or a method
whose statements are those of one in ``expert_gates.OWN_GATES``. Source: transformers.moe: the interface.
"""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import guard_scalar

from moe_lowering import _versions
from moe_lowering.argument_checks import require_instance
from moe_lowering.deployment import Deployment
from moe_lowering.functional import moe_experts
from moe_lowering.integrations.expert_gates import ExpertsForm, read_gate, same_code
from moe_lowering.integrations.replaced_experts import reason_not_replaced
from moe_lowering.layers.expert_modules import EXPERTS_IMPLEMENTATION, weight_names
from moe_lowering.layers.moe import MoE
from moe_lowering.vocabulary import EXPERT_FORMATS, swiglu_alpha

__all__ = ["NAME", "capabilities", "register", "token_mask"]

NAME = EXPERTS_IMPLEMENTATION
# What ``@use_experts_implementation`` sets on an instance.
_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated", "_is_expert_parallel")

# Parts of the names of arguments by which a module is told which tokens go to which expert.
_OF_A_CHOICE = ("index", "indices", "expert", "rout", "top_k", "size", "ids")

log = logging.getLogger(__name__)
_warned: set[str] = set()
_token_mask: Tensor | None = None


def register() -> None:
    """Make ``moe_lowering`` an experts implementation of transformers. Calling it again changes nothing.

    Raises:
        ImportError: transformers is missing, too old, or does not import (with torch_npu installed and no CANN, call
            ``moe_lowering.simulator.enable()`` first), or torch_npu collides with this torch.
    """
    if collision := _versions.cuda_collision():  # transformers imports torch_npu where it is installed
        raise ImportError(f"moe_lowering: {collision}")
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError(
            f"moe_lowering: transformers' experts interface does not import ({error}); accepted: transformers 5.20 or "
            "newer. With torch_npu installed and no CANN, call moe_lowering.simulator.enable() first"
        ) from error
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


class token_mask:  # a class: dynamo traces it
    """While it is entered, experts see only the tokens whose mask is True; the others load no expert, and get zero.

        with token_mask(mask):  # in the function that is compiled, or around a call without a graph
            model(input_ids=ids)

    For padding. Not for several threads at once. A module that keeps transformers' ``grouped_mm`` (see ``capabilities``)
    computes all tokens.

    Args:
        mask: bool, of as many elements as the model is given tokens, in their order.
    """

    def __init__(self, mask: Tensor) -> None:
        require_instance("token_mask", "mask", mask, Tensor, "a bool tensor, one for each token")
        if mask.dtype != torch.bool:
            raise TypeError(f"token_mask: mask is {mask.dtype}; accepted: bool")
        self.mask = mask
        self.outer: Tensor | None = None

    def __enter__(self) -> None:
        global _token_mask
        self.outer, _token_mask = _token_mask, self.mask

    def __exit__(self, *error: object) -> None:
        global _token_mask
        _token_mask = self.outer


def capabilities(model: nn.Module) -> list[tuple[str, bool, str]]:
    """(module name, supported, reason) of every experts module in ``model``; for a supported one, its activation.

    A module named like experts that does not take part in transformers' interface is listed as not supported.
    """
    require_instance("capabilities", "model", model, nn.Module, "a torch.nn.Module")
    rows = []
    of_experts = {id(weight) for each in model.modules() if _has_interface(each) for weight in each.parameters()}
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            rows.append((name, True, module.activation))
        elif _has_interface(module):
            form = _read_form(module)
            rows.append((name, not form.unrecognised, form.unrecognised or form.activation))
        elif any(id(weight) in of_experts for weight in module.parameters(recurse=False)):
            continue  # its weights are those of an experts module
        elif type(module).__name__.endswith("Experts") and not _computes_all_tokens(model, name, module):
            rows.append((name, False, reason_not_replaced(module)))
    return rows


def _has_interface(module: nn.Module) -> bool:
    return all(hasattr(module, flag) for flag in _FLAGS)


def _computes_all_tokens(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether a module beside the routed experts of a layer is told of no choice: shared experts, that each token has."""
    parent = model.get_submodule(name.rpartition(".")[0]) if name else model
    beside = any(_has_interface(other) for other in parent.children() if other is not module)
    parameters = inspect.signature(module.forward).parameters
    return beside and not any(word in parameter for parameter in parameters for word in _OF_A_CHOICE)


def form_of(module: nn.Module) -> ExpertsForm:
    """What an experts module (``layers.expert_modules.is_experts_module``) computes, or why that is not known."""
    return _read_form(module)


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts forward that transformers calls: [T, H], ids [T, k], weights [T, k] -> [T, H]."""
    form = _read_form(module)
    deployment: Deployment | None = getattr(module, "moe_lowering_deployment", None)
    quantisation = getattr(module, "moe_lowering_quantisation", "none")
    if form.unrecognised:
        sharded = deployment is not None and deployment.ep_size > 1
        _refuse(type(module).__name__, form.unrecognised, sharded, EXPERT_FORMATS[quantisation].quantised)
        return _grouped_mm()(module, hidden_states, top_k_index, top_k_weights)
    x = hidden_states.to(_activation_dtype(module, hidden_states.dtype))
    mask = _mask_of(hidden_states)
    if module.has_post_expert_norm:
        return _normalised(module, form, x, top_k_index, top_k_weights, mask).to(hidden_states.dtype)
    return _experts(module, form, x, top_k_index, top_k_weights, mask).to(hidden_states.dtype)


def _normalised(module: Any, form: ExpertsForm, x: Tensor, ids: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor:
    """The experts of a module that normalises each expert's output before it is weighted: each choice of a token is sent as
    a token of one expert, so the block is of k times as many tokens, and what follows the experts is the model's own."""
    tokens, top_k = ids.shape
    ones = weights.new_ones((tokens * top_k, 1))
    each = None if mask is None else mask.repeat_interleave(top_k)
    y = _experts(module, form, x.repeat_interleave(top_k, dim=0), ids.reshape(-1, 1), ones, each)
    weighted = module.post_expert_norm(y) * weights.reshape(-1, 1)
    total = weighted.view(tokens, top_k, x.shape[-1]).sum(dim=1)
    return total if mask is None else total.masked_fill(~mask.unsqueeze(-1), 0.0)


def _experts(module: Any, form: ExpertsForm, x: Tensor, ids: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor:
    """The experts of a module that this package has sharded, or that is whole."""
    quantisation = getattr(module, "moe_lowering_quantisation", "none")
    return run_experts(
        module,
        form,
        (x, weights, ids),
        num_experts=getattr(module, "moe_lowering_num_experts", module.num_experts),
        deployment=getattr(module, "moe_lowering_deployment", None),
        mask=mask,
        quantisation=quantisation,
        **_quantisers(module) if EXPERT_FORMATS[quantisation].quantised else {},
    )


def run_experts(
    module: Any,
    form: ExpertsForm,
    tokens: tuple[Tensor, Tensor, Tensor],
    *,
    num_experts: int,
    deployment: Deployment | None,
    **options: Any,
) -> Tensor:
    """``moe_experts`` with the weights, biases and words of a module of transformers.

    Args:
        form: what the experts compute.
        tokens: x [T, H], weights and ids [T, k].
        num_experts: of all ranks.
        options: more of ``moe_experts``.
    """
    first, second = weight_names(module)
    w13, w2 = getattr(module, first), getattr(module, second)
    if not module.is_transposed:
        w13, w2 = w13.transpose(-2, -1), w2.transpose(-2, -1)
    return moe_experts(
        *tokens,
        w13,
        w2,
        num_experts=num_experts,
        w13_bias=getattr(module, f"{first}_bias") if module.has_bias else None,
        w2_bias=getattr(module, f"{second}_bias") if module.has_bias else None,
        activation=form.activation,
        limit=form.limit,
        alpha=form.alpha,
        interleaved=form.interleaved,
        deployment=deployment,
        **options,
    )


def _mask_of(hidden_states: Tensor) -> Tensor | None:
    """The mask that is entered, [...] for hidden states [..., H]."""
    if _token_mask is None:
        return None
    lead = hidden_states.shape[:-1]
    if _token_mask.numel() != lead.numel():
        raise ValueError(
            f"token_mask: mask has shape {list(_token_mask.shape)} for hidden states {list(hidden_states.shape)}; accepted: "
            "one element for each token"
        )
    return _token_mask.reshape(lead)


def _activation_dtype(module: Any, default: torch.dtype) -> torch.dtype:
    """The dtype in which experts take tokens: that of the weights; of w4a16's scales; any for int8 rows."""
    quantisation = getattr(module, "moe_lowering_quantisation", "none")
    form = EXPERT_FORMATS[quantisation]
    if not form.quantised:
        return _first_tensor(module.down_proj).dtype
    return _first_tensor(module.down_proj_scale).dtype if form.weight_only else default


def _first_tensor(weights: Any) -> Tensor:
    """The one tensor of all experts, or that of the first (``experts.list_experts``)."""
    return weights if isinstance(weights, Tensor) else weights[0]


def _quantisers(module: Any) -> dict[str, Any]:
    """What ``quantise_experts`` put beside the weights, by the argument of ``moe_experts``."""
    return {
        f"{ours}_{what}": getattr(module, f"{theirs}_{what}")
        for ours, theirs in zip(("w13", "w2"), weight_names(module), strict=True)
        for what in ("scale", "offset", "scale_bias")
    }


def _read_form(module: Any) -> ExpertsForm:
    """Traced by dynamo: each attribute is read here, so that the graph is made anew when it changes, and by value, so that
    equal layers share one graph. What is looked up by them is a constant of the trace (``read_gate``)."""
    act = getattr(module, "act_fn", None)
    # The first look makes dynamo guard on whether the module has a gate of its own; ``vars`` alone has no such guard.
    own_gate = module._apply_gate is not None and "_apply_gate" in vars(module)
    reading = read_gate(
        type(module)._apply_gate,
        own_gate,
        module._is_expert_parallel,
        module.has_gate,
        module.is_concatenated,
        type(act),
        act is nn.functional.silu,
        act.approximate if type(act) is nn.GELU else "",
        getattr(act, "__name__", ""),
        isinstance(act, nn.Module) and ("forward" in vars(act) or bool(act._forward_hooks or act._forward_pre_hooks)),
    )
    if reading.unrecognised:
        return ExpertsForm(unrecognised=reading.unrecognised)
    constants = {"limit": 0.0, "alpha": swiglu_alpha()}
    for constant, attribute in (("limit", reading.limit), ("alpha", reading.alpha)):
        if attribute:
            owner, name = _owner(module, attribute)
            if reading.caps and not same_code(type(owner), reading.caps):
                return ExpertsForm(
                    unrecognised=f"its {attribute.rpartition('.')[0]} is a {type(owner).__name__} that is not known"
                )
            value = getattr(owner, name, None)
            if not isinstance(value, (int, float)):
                return ExpertsForm(unrecognised=f"its {attribute} is {value!r}, not a number")
            # stays a number where dynamo would make it an input of the graph: with dynamic=True, or once it has changed
            constants[constant] = float(guard_scalar(value))
    if reading.activation == "swiglu_clamp_after" and constants["limit"] == math.inf:
        return ExpertsForm("swiglu")  # of layers that the model does not clamp
    return ExpertsForm(reading.activation, constants["limit"], constants["alpha"], reading.interleaved)


def _owner(module: Any, attribute: str) -> tuple[Any, str]:
    """The module that has an attribute which is named with dots, and its name there."""
    *path, name = attribute.split(".")
    for step in path:
        module = getattr(module, step, None)
    return module, name


def _grouped_mm() -> Callable[..., Tensor]:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS["grouped_mm"]


@torch.compiler.assume_constant_result
def _refuse(class_name: str, reason: str, sharded: bool, quantised: bool) -> bool:
    """Say once per class that it falls back; raise when its experts are sharded or quantised, which that cannot read."""
    if sharded or quantised:
        raise NotImplementedError(
            f"moe_lowering: {class_name} is not supported: {reason}. Its experts are "
            f"{'sharded' if sharded else 'quantised'}, so it cannot use transformers' grouped_mm"
        )
    if class_name not in _warned:
        _warned.add(class_name)
        warnings.warn(
            f"moe_lowering: {class_name} is not supported: {reason}. It uses transformers' grouped_mm", stacklevel=2
        )
    return True
