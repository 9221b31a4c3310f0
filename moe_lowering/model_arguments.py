"""Checks of the arguments of ``MoE``, ``moe_experts`` and ``route``, before an operator sees them, and their conversion.

Each check raises a ValueError or TypeError with the argument, its value and what is accepted. torch's own check of an
operator's schema names the operator and not the function that the user called, and takes 1.5 for True and a tensor for a
number. Sizes that may be symbolic are compared where the operators do it (``custom_ops.sizes``), so that nothing here adds
a guard. Ids become int32 and weights float32 here, and no value may change by that; weights become lists, logical experts
physical ones.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from moe_lowering.argument_checks import (
    refuse,
    require_choice,
    require_flag,
    require_instance,
    require_integer,
    require_number,
)
from moe_lowering.custom_ops import one_rank
from moe_lowering.custom_ops.grouped_mlp import FLOATS, HALVES
from moe_lowering.custom_ops.quantised import WEIGHT_DTYPES
from moe_lowering.custom_ops.route import GROUP_SCORES, SCORINGS
from moe_lowering.deployment import Deployment
from moe_lowering.number_words import count_of
from moe_lowering.vocabulary import ACTIVATIONS, EXPERT_FORMATS

Weights = Tensor | Sequence[Tensor]
_TOKENS = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
_WEIGHTS = "a tensor of all experts, or a sequence of one for each"
_FORMS = {
    "w13": "a tensor [E_local, H, 2I], or a sequence of E_local tensors [H, 2I]",
    "w2": "a tensor [E_local, I, H], or a sequence of E_local tensors [I, H]",
}
_OPTIONAL = {
    "mask": "a bool tensor [...]",
    "pertoken_scale": "a float32 tensor [...]",
    "log2phy": "an int32 or int64 tensor [logical experts]",
    "expert_map": "an int32 or int64 tensor [num_experts]",
}


def check_layer(
    *,
    sizes: Mapping[str, Any],
    top_k: Any,
    shared_experts: Any,
    flags: Mapping[str, Any],
    numbers: Mapping[str, Any],
    words: Mapping[str, Any],
) -> None:
    """What ``MoE`` computes; what depends on several arguments is left to ``MoE`` and its operators."""
    for name, size in sizes.items():
        require_integer("MoE", name, size, 1)
    require_integer("MoE", "top_k", top_k, 1, sizes["num_experts"])
    require_integer("MoE", "shared_experts", shared_experts, 0)
    for name, flag in flags.items():
        require_flag("MoE", name, flag)
    for name, number in numbers.items():
        require_number("MoE", name, number)
    accepted = {"scoring": SCORINGS, "group_score": GROUP_SCORES, "activation": ACTIVATIONS}
    for name, word in words.items():
        require_choice("MoE", name, word, accepted[name])


def check_layer_place(deployment: Any, dtype: Any, device: Any) -> None:
    """The arguments of ``MoE`` that say where it is, and in which dtype."""
    kinds = (Deployment, type(None))
    require_instance("MoE", "deployment", deployment, kinds, "a moe_lowering.Deployment, or None")
    if dtype not in (*FLOATS, None) or (dtype is None and torch.get_default_dtype() not in FLOATS):
        shown = f"None, torch's default dtype {torch.get_default_dtype()}" if dtype is None else repr(dtype)
        raise TypeError(f"MoE: dtype is {shown}; accepted: torch.float32, torch.float16, torch.bfloat16")
    if device is not None:
        try:
            torch.device(device)
        except (RuntimeError, TypeError) as error:  # RuntimeError: an unknown name; TypeError: another type
            raise refuse("MoE", "device", device, f"a torch.device, its name, or None ({error})") from error


def check_experts_per_rank(where: str, num_experts: int, shared_experts: int, deployment: Deployment) -> None:
    """The routed experts are spread evenly, and the shared ones are those of the deployment's shared-expert ranks."""
    ranks = deployment.routed_ranks
    if num_experts % ranks:
        name = "ep_size - shared_expert_ranks" if deployment.shared_expert_ranks else "ep_size"
        raise ValueError(f"{where}: num_experts is {num_experts}; accepted: a multiple of {name}, {ranks}")
    expected = deployment.shared_experts if deployment.shared_expert_ranks else 0
    if shared_experts != expected:
        raise ValueError(
            f"{where}: shared_experts is {shared_experts}; accepted: {expected}, as the deployment has "
            f"{deployment.shared_expert_ranks} shared-expert ranks (modules of transformers hold no shared experts: write the "
            "layer as MoE)"
        )


def check_layer_call(x: Any, mask: Any, hidden_size: int, experts: Tensor, gate: nn.Module) -> None:
    """The arguments of a call of ``MoE``, with the weights of an expert, and its gate: where the experts are quantised, a plain
    linear gate would end in an error of torch for x of another dtype. A gate of the user's own may cast, and autocast does."""
    require_instance("MoE", "x", x, Tensor, f"a tensor [..., {hidden_size}]")
    if x.dim() < 1 or x.shape[-1] != hidden_size:
        raise ValueError(f"MoE: x has shape {list(x.shape)}; accepted: [..., {hidden_size}]")
    if x.dtype not in FLOATS:
        raise TypeError(f"MoE: x is {x.dtype}; accepted: float32, float16, bfloat16")
    if experts.dtype in FLOATS:
        _require_dtype_of(x, experts, "weights are")
    elif type(gate) is nn.Linear and not torch.compiler.is_compiling() and not _casts_by_itself(x.device.type):
        _require_dtype_of(x, gate.weight, "gate is")
    require_instance("MoE", "mask", mask, (Tensor, type(None)), "a bool tensor [...], or None")


def _require_dtype_of(x: Tensor, model: Tensor, what: str) -> None:
    if x.dtype != model.dtype:
        raise TypeError(f"MoE: x is {x.dtype}, and the layer's {what} {model.dtype}; accepted: x of {model.dtype}")


def _casts_by_itself(device: str) -> bool:
    """Whether autocast is on; some devices, such as meta, have none."""
    try:
        return torch.is_autocast_enabled(device)
    except RuntimeError:
        return False


def check_route(
    logits: Any,
    bias: Any,
    integers: Mapping[str, Any],
    words: Mapping[str, Any],
    renormalize: Any,
    scale: Any,
    epsilon: Any,
) -> None:
    """The kinds of the arguments of ``route``; the operator knows the ranges."""
    require_instance("route", "logits", logits, Tensor, "a tensor [..., E] of float32, float16 or bfloat16")
    require_instance("route", "bias", bias, (Tensor, type(None)), "a tensor [E], or None")
    for name, value in integers.items():
        _require_size("route", name, value)
    accepted = {"scoring": SCORINGS, "group_score": GROUP_SCORES}
    for name, word in words.items():
        require_choice("route", name, word, accepted[name])
    require_flag("route", "renormalize", renormalize)
    _require_real("route", "scale", scale)
    _require_real("route", "epsilon", epsilon)


def check_experts_tensors(
    tokens: Mapping[str, Any],
    weights: Mapping[str, Any],
    optional_weights: Mapping[str, Any],
    optional_tensors: Mapping[str, Any],
) -> None:
    """The kinds of the tensors that ``moe_experts`` takes."""
    where = "moe_experts"
    for name, value in tokens.items():
        require_instance(where, name, value, Tensor, "a tensor")
    for name, value in weights.items():
        if not _are_weights(value) or (not isinstance(value, Tensor) and len(value) == 0):
            raise refuse(where, name, value, _WEIGHTS)
        if isinstance(value, Tensor) and value.dim() not in (2, 3):  # [H, 2I] is one expert
            raise ValueError(f"{where}: {name} has {count_of(value.dim(), 'dimension')}; accepted: {_FORMS[name]}")
    for name, value in optional_weights.items():
        if value is not None and not _are_weights(value):
            raise refuse(where, name, value, f"{_WEIGHTS}, or None")
    for name, value in optional_tensors.items():
        if value is not None:
            require_instance(where, name, value, Tensor, f"{_OPTIONAL[name]}, or None")


def check_experts_options(
    flags: Mapping[str, Any], numbers: Mapping[str, Any], num_experts: Any, words: Mapping[str, Any], deployment: Any
) -> None:
    """The kinds of the other arguments of ``moe_experts``."""
    where = "moe_experts"
    for name, value in flags.items():
        require_flag(where, name, value)
    for name, value in numbers.items():
        _require_real(where, name, value)
    if num_experts is not None:
        _require_size(where, "num_experts", num_experts)
    require_choice(where, "activation", words["activation"], ACTIVATIONS)
    require_choice(where, "quantisation", words["quantisation"], EXPERT_FORMATS)
    require_instance(where, "deployment", deployment, (Deployment, type(None)), "a moe_lowering.Deployment, or None")


def as_routing_weights(weights: Tensor) -> Tensor:
    """Routing weights as the operators take them; of a complex number only a part would be left. Those of 16 bits stay: a cast
    costs a kernel, and AllGather and AllToAll use them so."""
    if not weights.dtype.is_floating_point:
        raise TypeError(f"moe_experts: weights is {weights.dtype}; accepted: float32, float16, bfloat16, float64")
    return weights if weights.dtype in FLOATS else weights.to(torch.float32)


def as_int32(name: str, ids: Tensor) -> Tensor:
    """Ids as the operators take them. Outside of a graph an id beyond int32 is refused, as the cast would make another
    id of it: 2**32 would be expert 0."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"moe_experts: {name} is {ids.dtype}; accepted: int32, int64")
    cast = ids.to(torch.int32)
    if ids.dtype == torch.int64 and not torch.compiler.is_compiling() and ids.device.type == "cpu":
        readable = not isinstance(ids, FakeTensor) and get_proxy_mode() is None  # make_fx hands out real tensors, too
        if readable and not torch.equal(cast.long(), ids):
            raise ValueError(
                f"moe_experts: {name} has {int(ids[cast != ids].flatten()[0])}, which is no int32; accepted: 0 to num_experts - 1"
            )
    return cast


def _are_weights(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    return isinstance(value, (Sequence, nn.ParameterList)) and all(isinstance(each, Tensor) for each in value)


def _require_size(where: str, name: str, value: Any) -> None:
    """An int, symbolic or not: torch would take a tensor or True for one."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise refuse(where, name, value, "an int")


def _require_real(where: str, name: str, value: Any) -> None:
    """A number, symbolic or not, or None for the default; the operator refuses those that are not finite."""
    if value is None:
        return
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) or isinstance(value, bool):
        raise refuse(where, name, value, "a finite number, or None")


def check_tokens(x: Tensor, pertoken_scale: Tensor | None, quantisation: str, out_dtype: torch.dtype | None) -> None:
    """Refuses what an operator would refuse, with the names of the caller's arguments in the message."""
    if x.dtype not in _TOKENS:
        raise TypeError(f"moe_experts: x is {x.dtype}; accepted: float32, float16, bfloat16, int8")
    if (x.dtype == torch.int8) != (pertoken_scale is not None):
        state = "None" if pertoken_scale is None else "given"
        raise ValueError(
            f"moe_experts: pertoken_scale is {state} for x of {x.dtype}; accepted: one for int8, None else"
        )
    if x.dtype == torch.int8 and not EXPERT_FORMATS[quantisation].int8_rows:
        raise ValueError(f"moe_experts: x is int8 for quantisation {quantisation!r}; accepted: 'w8a8', 'w4a8'")
    if x.dtype == torch.int8 and out_dtype is None:
        raise ValueError("moe_experts: out_dtype is None for int8 x; accepted: float32, float16, bfloat16")
    if x.dtype != torch.int8 and out_dtype not in (None, x.dtype):
        raise ValueError(f"moe_experts: out_dtype is {out_dtype} for x of {x.dtype}; accepted: None or {x.dtype}")


def check_weight_dtypes(x: Tensor, quantisation: str, scales: Mapping[str, Any], **matrices: Weights) -> None:
    """Refuses weights, and scales of ``scales``, of another dtype than x and the quantisation want, by the caller's names.
    Of a list the first is looked at, as dynamo traces this; the operator looks at all. Dtypes are guards of any graph."""
    form = EXPERT_FORMATS[quantisation]
    if form.weight_only and x.dtype not in HALVES:
        raise TypeError(f"moe_experts: x is {x.dtype} for quantisation {quantisation!r}; accepted: float16, bfloat16")
    wanted = WEIGHT_DTYPES[quantisation] if form.quantised else x.dtype
    for name, weights in matrices.items():
        which, dtype = _first_of(name, weights)
        if dtype == wanted:
            continue
        if form.quantised:
            raise TypeError(
                f"moe_experts: {which} is {dtype} for quantisation {quantisation!r}; accepted: {wanted}, as quantise_experts "
                "makes them"
            )
        advice = "weights of x's dtype" + ("" if dtype.is_floating_point else ", or the quantisation that these have")
        raise TypeError(f"moe_experts: {which} is {dtype}, and x is {x.dtype}; accepted: {advice}")
    for name, scale in scales.items() if form.weight_only else ():
        if scale is None or (not isinstance(scale, Tensor) and len(scale) == 0):  # the operator wants one
            continue
        which, dtype = _first_of(name, scale)
        if dtype != x.dtype:
            raise TypeError(
                f"moe_experts: x is {x.dtype}, and {which} is {dtype}; accepted for {quantisation}: one dtype, that of the "
                "layer which was quantised"
            )


def _first_of(name: str, weights: Weights) -> tuple[str, torch.dtype]:
    """The first tensor of an argument, as its caller would call it, and its dtype."""
    return (name, weights.dtype) if isinstance(weights, Tensor) else (f"{name}[0]", weights[0].dtype)


def list_matrices(name: str, weights: Weights, need_trans: bool, quantisation: str) -> list[Tensor]:
    """Weights as a list, each [(E_local,) K, N]."""
    if not need_trans:
        return as_list(weights)
    if EXPERT_FORMATS[quantisation].packed > 1:
        raise ValueError(
            f"moe_experts: need_trans is True for {name} of {quantisation}; accepted: False, as packed int4 cannot be "
            "transposed"
        )
    return [tensor.transpose(-2, -1) for tensor in as_list(weights)]


def physical_ids(ids: Tensor, log2phy: Tensor) -> Tensor:
    """The physical experts of logical ``ids`` [..., k], int32. On CPU an id outside of log2phy is an IndexError."""
    if log2phy.dim() != 1 or log2phy.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"moe_experts: log2phy is {log2phy.dtype} of shape {list(log2phy.shape)}; accepted: int32 or int64 "
            "[logical experts]"
        )
    return as_int32("log2phy", log2phy).index_select(0, ids.reshape(-1)).reshape(ids.shape)


def weigh_tokens(
    x: Tensor, pertoken_scale: Tensor | None, weights: Tensor, deployment: Deployment
) -> tuple[Tensor, Tensor | None, Tensor]:
    """x times its weight [..., 1] (int8: its scale times its weight), and weights of 1."""
    if deployment.shared_expert_ranks:
        raise ValueError(
            f"moe_experts: apply_router_weight_on_input is True with {deployment.shared_expert_ranks} shared-expert ranks; "
            "accepted: False, as shared experts take x without a weight"
        )
    if weights.shape[-1] != 1:
        raise ValueError(
            f"moe_experts: apply_router_weight_on_input is True for k = {weights.shape[-1]}; accepted: k = 1, as x is "
            "sent once, with one weight"
        )
    if pertoken_scale is None:
        return (x * weights).to(x.dtype), None, torch.ones_like(weights)
    return x, pertoken_scale * weights.squeeze(-1), torch.ones_like(weights)


def as_list(tensors: Weights | None) -> list[Tensor]:
    """Weights as the operators take them: one stacked tensor, or one for each expert; [] for None."""
    if tensors is None:
        return []
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def one_rank_key(
    layer: one_rank.Layer, absent: tuple[Any, ...], options: tuple[Any, ...], place: Any
) -> Hashable | None:
    """What the checks of a call of ``moe_experts`` depend on that ``one_rank`` may compute; None of others.

    Args:
        absent: the arguments that such a call does not have.
        options: num_experts, quantisation, and flags that are False in such a call. place: the deployment.
    """
    quantisation, *flags = options[1:]
    if any(each is not None for each in absent) or any(flag is not False for flag in flags):
        return None
    if not isinstance(place, Deployment) or place.ep_size != 1 or place.tp_size != 1:
        return None
    if not isinstance(quantisation, str) or quantisation != "none":
        return None
    return one_rank.signature(layer, (*options, place.token_bound, place.max_rows))
