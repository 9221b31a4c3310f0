"""What the experts modules of transformers compute between their projections: transformers' default gate with a known
activation, or a method whose statements are those of one in ``OWN_GATES``. Nothing is guessed.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from moe_lowering.vocabulary import SWIGLU_ALPHA

__all__ = ["OWN_GATES", "ExpertsForm", "OwnGate", "Reading", "gate_fingerprint", "read_gate", "same_code"]


class ExpertsForm(NamedTuple):
    """What an experts module computes between its projections, in terms of ``moe_experts``; or why that is not known."""

    activation: str = ""
    limit: float = 0.0
    alpha: float = SWIGLU_ALPHA
    interleaved: bool = False
    unrecognised: str = ""


class OwnGate(NamedTuple):
    """A known ``_apply_gate``: its activation ("" = by ``act_fn``) and the attributes it reads, with dots.

    ``models``: the model types whose experts have it, as (text) configs have them; what such a config says of it is an entry
    of ``explanation.configs.GATES``, but for a gate without an activation of its own.
    ``act_fn``: the hash of the forward of the module ``act_fn`` that it calls, where that is the model's own;
    ``caps``: the hash of the forward of the modules in it that ``limit`` and ``alpha`` are of.
    """

    activation: str
    models: tuple[str, ...]
    interleaved: bool = False
    limit: str = ""
    alpha: str = ""
    act_fn: str = ""
    caps: str = ""


# By ``gate_fingerprint`` of the method; read and translated by hand, and each compared with its model in tests.
OWN_GATES = {
    "d2280d6cb449ef4d": OwnGate("swiglu_oai", ("gpt_oss",), interleaved=True, limit="limit", alpha="alpha"),
    "16dda23ffa1117db": OwnGate("swiglu_oai", ("openai_privacy_filter",), limit="limit", alpha="alpha"),
    "c2cd555edece6a1a": OwnGate("swiglu_oai", ("minimax_m3_vl_text",), limit="swiglu_limit", alpha="swiglu_alpha"),
    "71529536b1762a73": OwnGate("swiglu_clamp", ("deepseek_v4",), limit="limit"),  # calls act_fn
    "d0727b6385447f99": OwnGate("swiglu_clamp", ("hy_v4", "glm5_next_text"), limit="swiglu_limit"),
    "09826a8b199dad9d": OwnGate("", ("beam",)),  # the default gate in float32, as ours is
    "e73c0274c903a342": OwnGate("swiglu_clamp_after", ("step3p5",), limit="limit"),  # calls act_fn
    "940a99606cd8f64e": OwnGate(
        "swiglu_softcap",
        ("inkling2_text",),
        limit="act_fn.gate_softcap.softcap",
        alpha="act_fn.up_softcap.softcap",
        act_fn="3800c8d7931f3a3b",
        caps="ccdd6781caf169cb",
    ),
}
_CALLS_ACT_FN = frozenset({"71529536b1762a73", "09826a8b199dad9d", "e73c0274c903a342"})


class Reading(NamedTuple):
    """What the class of a module and its flags say; ``limit`` and ``alpha`` name the attributes that hold these numbers."""

    activation: str = ""
    interleaved: bool = False
    limit: str = ""
    alpha: str = ""
    caps: str = ""
    unrecognised: str = ""


@torch.compiler.assume_constant_result
def read_gate(
    gate_method: Callable[..., Any],
    own_gate: bool,
    expert_parallel: bool,
    has_gate: bool,
    concatenated: bool,
    act_class: type,
    act_is_silu: bool,
    approximate: str,
    act_name: str,
    act_is_changed: bool,
) -> Reading:
    """From arguments that are equal for equal layers: a module among them would be guarded on by its identity."""
    if expert_parallel:
        return Reading(unrecognised="it is sharded by transformers' own expert parallelism")
    if own_gate:
        return Reading(unrecognised="its _apply_gate is replaced on the instance")
    if act_is_changed:
        return Reading(unrecognised="its act_fn has hooks or a forward of its own")
    if not has_gate:
        activation = _UNGATED.get(act_class.__name__, "") if _is_of_transformers(act_class) else ""
        name = act_name or act_class.__name__
        without = f"it has no gate projection (has_gate=False), and its activation is {name}, not ReLU or its square"
        return Reading(activation) if activation else Reading(unrecognised=without)
    activation = "swiglu" if act_is_silu else _activation(act_class, approximate)
    unknown = f"its activation is {act_name or act_class.__name__}, not SiLU or GELU"
    if gate_method is _default_gate():
        if not concatenated:  # the default gate halves its input, whatever the flag says
            return Reading(unrecognised="is_concatenated=False with the default _apply_gate")
        return Reading(activation) if activation else Reading(unrecognised=unknown)
    fingerprint = gate_fingerprint(gate_method)
    gate = OWN_GATES.get(fingerprint)
    if gate is None:
        return Reading(unrecognised="its class has an _apply_gate of its own that is not known")
    if fingerprint in _CALLS_ACT_FN and activation != "swiglu":
        return Reading(unrecognised=unknown)
    if gate.act_fn and not same_code(act_class, gate.act_fn):
        return Reading(unrecognised=unknown)
    if gate.interleaved == concatenated:
        return Reading(unrecognised=f"is_concatenated={concatenated} contradicts its _apply_gate")
    return Reading(gate.activation or "swiglu", gate.interleaved, gate.limit, gate.alpha, gate.caps)


# The activation of ``moe_experts`` for an act_fn without a gate, by its class.
_UNGATED = {"ReLU": "relu", "ReLUSquaredActivation": "relu2"}


def _is_of_transformers(act_class: type) -> bool:
    """Whether a class of one of these names is torch's or transformers' own."""
    from transformers import activations

    return act_class in (nn.ReLU, activations.ReLUSquaredActivation)


@torch.compiler.assume_constant_result
def same_code(module_class: type[nn.Module], fingerprint: str) -> bool:
    """Whether the forward of a class is the one that has this hash."""
    return gate_fingerprint(module_class.forward) == fingerprint


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
