"""Hugging Face transformers: the experts implementation ``moe_lowering``.

    from moe_lowering.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moe_lowering")

Every model whose experts module carries ``@use_experts_implementation`` then computes its experts with
``functional.moe_experts``; router, shared experts and the rest stay as they are. ``capabilities`` says beforehand
which modules of a model can. One that cannot (see ``_read_form``) keeps transformers' ``grouped_mm``, with one warning for
its class; where its experts are spread over ranks that would be wrong, so there it raises.

What a module's gate computes is never guessed: it is transformers' default gate with a known activation, or a method
whose statements are those of one in ``_OWN_GATES``. Source: transformers.moe: the interface.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import logging
import textwrap
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import guard_scalar

from moe_lowering import _versions
from moe_lowering.argument_checks import require_instance
from moe_lowering.deployment import Deployment
from moe_lowering.functional import moe_experts
from moe_lowering.layers import EXPERTS_IMPLEMENTATION, MoE
from moe_lowering.vocabulary import EXPERT_FORMATS

__all__ = ["NAME", "capabilities", "register", "token_mask"]

NAME = EXPERTS_IMPLEMENTATION
# What ``@use_experts_implementation`` sets on an instance.
_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated", "_is_expert_parallel")

log = logging.getLogger(__name__)
_warned: set[str] = set()
_token_mask: Tensor | None = None


class ExpertsForm(NamedTuple):
    """What an experts module computes between its projections, in terms of ``moe_experts``; or why that is not known."""

    activation: str = ""
    limit: float = 0.0
    alpha: float = 1.702
    interleaved: bool = False
    unrecognised: str = ""


class _OwnGate(NamedTuple):
    """A known ``_apply_gate``: its activation ("" = by ``act_fn``) and the attributes it reads."""

    activation: str
    interleaved: bool = False
    limit: str = ""
    alpha: str = ""


# By ``gate_fingerprint`` of the method; read and translated by hand, and each compared with its model in tests.
_OWN_GATES = {
    "d2280d6cb449ef4d": _OwnGate("swiglu_oai", interleaved=True, limit="limit", alpha="alpha"),  # gpt_oss
    "16dda23ffa1117db": _OwnGate("swiglu_oai", limit="limit", alpha="alpha"),  # openai_privacy_filter
    "c2cd555edece6a1a": _OwnGate("swiglu_oai", limit="swiglu_limit", alpha="swiglu_alpha"),  # minimax_m3_vl
    "71529536b1762a73": _OwnGate("swiglu_clamp", limit="limit"),  # deepseek_v4; calls act_fn
    "d0727b6385447f99": _OwnGate("swiglu_clamp", limit="swiglu_limit"),  # hy_v4, glm5_next
    "09826a8b199dad9d": _OwnGate(""),  # beam: the default gate in float32, as ours is
}
_CALLS_ACT_FN = frozenset({"71529536b1762a73", "09826a8b199dad9d"})


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
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            rows.append((name, True, module.activation))
        elif all(hasattr(module, flag) for flag in _FLAGS):
            form = _read_form(module)
            rows.append((name, not form.unrecognised, form.unrecognised or form.activation))
        elif type(module).__name__.endswith("Experts"):
            rows.append((name, False, "its class does not use transformers' experts interface"))
    return rows


def form_of(module: nn.Module) -> ExpertsForm:
    """What an experts module (``layers.is_experts_module``) computes, or why that is not known."""
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
    w13, w2 = module.gate_up_proj, module.down_proj
    if not module.is_transposed:
        w13, w2 = w13.transpose(-2, -1), w2.transpose(-2, -1)
    y = moe_experts(
        hidden_states.to(_activation_dtype(module, hidden_states.dtype)),
        top_k_weights,
        top_k_index,
        w13,
        w2,
        num_experts=getattr(module, "moe_lowering_num_experts", module.num_experts),
        w13_bias=module.gate_up_proj_bias if module.has_bias else None,
        w2_bias=module.down_proj_bias if module.has_bias else None,
        activation=form.activation,
        limit=form.limit,
        alpha=form.alpha,
        interleaved=form.interleaved,
        mask=_mask_of(hidden_states),
        deployment=deployment,
        quantisation=quantisation,
        **_quantisers(module) if EXPERT_FORMATS[quantisation].quantised else {},
    )
    return y.to(hidden_states.dtype)


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
        return _first_tensor(module.gate_up_proj).dtype
    return _first_tensor(module.gate_up_proj_scale).dtype if form.weight_only else default


def _first_tensor(weights: Any) -> Tensor:
    """The one tensor of all experts, or that of the first (``experts.list_experts``)."""
    return weights if isinstance(weights, Tensor) else weights[0]


def _quantisers(module: Any) -> dict[str, Any]:
    """What ``quantise_experts`` put beside the weights, by the argument of ``moe_experts``."""
    return {
        f"{ours}_{what}": getattr(module, f"{theirs}_{what}")
        for ours, theirs in (("w13", "gate_up_proj"), ("w2", "down_proj"))
        for what in ("scale", "offset", "scale_bias")
    }


def _read_form(module: Any) -> ExpertsForm:
    """Traced by dynamo: each attribute is read here, so that the graph is made anew when it changes, and by value, so that
    equal layers share one graph. What is looked up by them is a constant of the trace (``_read_flags``)."""
    act = getattr(module, "act_fn", None)
    # The first look makes dynamo guard on whether the module has a gate of its own; ``vars`` alone has no such guard.
    own_gate = module._apply_gate is not None and "_apply_gate" in vars(module)
    reading = _read_flags(
        type(module)._apply_gate,
        own_gate,
        module._is_expert_parallel,
        module.has_gate,
        module.has_post_expert_norm,
        module.is_concatenated,
        type(act),
        act is nn.functional.silu,
        act.approximate if type(act) is nn.GELU else "",
        getattr(act, "__name__", ""),
        isinstance(act, nn.Module) and ("forward" in vars(act) or bool(act._forward_hooks or act._forward_pre_hooks)),
    )
    if reading.unrecognised:
        return ExpertsForm(unrecognised=reading.unrecognised)
    constants = {"limit": 0.0, "alpha": 1.702}
    for constant, attribute in (("limit", reading.limit), ("alpha", reading.alpha)):
        if attribute:
            value = getattr(module, attribute, None)
            if not isinstance(value, (int, float)):
                return ExpertsForm(unrecognised=f"its {attribute} is {value!r}, not a number")
            # stays a number where dynamo would make it an input of the graph: with dynamic=True, or once it has changed
            constants[constant] = float(guard_scalar(value))
    return ExpertsForm(reading.activation, constants["limit"], constants["alpha"], reading.interleaved)


class _ModuleFlags(NamedTuple):
    """What the class of a module and its flags say; ``limit`` and ``alpha`` name the attributes that hold these numbers."""

    activation: str = ""
    interleaved: bool = False
    limit: str = ""
    alpha: str = ""
    unrecognised: str = ""


@torch.compiler.assume_constant_result
def _read_flags(
    gate_method: Callable[..., Any],
    own_gate: bool,
    expert_parallel: bool,
    has_gate: bool,
    post_expert_norm: bool,
    concatenated: bool,
    act_class: type,
    act_is_silu: bool,
    approximate: str,
    act_name: str,
    act_is_changed: bool,
) -> _ModuleFlags:
    """From arguments that are equal for equal layers: a module among them would be guarded on by its identity."""
    if expert_parallel:
        return _ModuleFlags(unrecognised="it is sharded by transformers' own expert parallelism")
    if not has_gate:
        return _ModuleFlags(unrecognised="it has no gate projection (has_gate=False)")
    if post_expert_norm:
        return _ModuleFlags(unrecognised="it normalises each expert's output (has_post_expert_norm=True)")
    if own_gate:
        return _ModuleFlags(unrecognised="its _apply_gate is replaced on the instance")
    if act_is_changed:
        return _ModuleFlags(unrecognised="its act_fn has hooks or a forward of its own")
    activation = "swiglu" if act_is_silu else _activation(act_class, approximate)
    unknown = f"its activation is {act_name or act_class.__name__}, not SiLU or GELU"
    if gate_method is _default_gate():
        if not concatenated:  # the default gate halves its input, whatever the flag says
            return _ModuleFlags(unrecognised="is_concatenated=False with the default _apply_gate")
        return _ModuleFlags(activation) if activation else _ModuleFlags(unrecognised=unknown)
    fingerprint = gate_fingerprint(gate_method)
    gate = _OWN_GATES.get(fingerprint)
    if gate is None:
        return _ModuleFlags(unrecognised="its class has an _apply_gate of its own that is not known")
    if fingerprint in _CALLS_ACT_FN and activation != "swiglu":
        return _ModuleFlags(unrecognised=unknown)
    if gate.interleaved == concatenated:
        return _ModuleFlags(unrecognised=f"is_concatenated={concatenated} contradicts its _apply_gate")
    return _ModuleFlags(gate.activation or "swiglu", gate.interleaved, gate.limit, gate.alpha)


def _activation(act_class: type, approximate: str) -> str:
    """The activation of ``moe_experts`` whose gate function has this exact class; "" when it is none of them."""
    from transformers import activations

    if act_class is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate, "")
    by_class = {
        nn.SiLU: "swiglu",
        activations.SiLUActivation: "swiglu",
        activations.GELUActivation: "gelu",
        activations.GELUTanh: "gelu_tanh",
        activations.NewGELUActivation: "gelu_tanh",
    }
    return by_class.get(act_class, "")


@functools.cache
def gate_fingerprint(method: Callable[..., Any]) -> str:
    """Hash of a method's statements, without comments, layout and docstring; "" when its source is not available."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return ""
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef):
        return ""
    body = function.body[ast.get_docstring(function) is not None :]
    return hashlib.sha256("\n".join(map(ast.unparse, body)).encode()).hexdigest()[:16]


def _default_gate() -> Any:
    from transformers.integrations import moe

    return getattr(moe, "_default_apply_gate", None)  # private: without it no module counts as recognised


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
