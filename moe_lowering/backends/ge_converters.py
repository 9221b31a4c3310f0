"""GE converters for the operators of this package that a lowered graph may hold.

Fused operators become the operators that their provider registers with GE. Names and order of inputs follow the IR that
is registered, as both grew from version to version: what a call needs and the IR does not have is refused. The engine
must infer shapes; vllm-ascend's own inference leaves out those of both results, so torchair's rule, which it makes from
the fake kernel and attaches as ``_inference_rule``, is what there is (tried up to the attribute; nothing here ran on a
device).

``assert_tokens`` is host code. torchair makes the Python that prepares a call's inputs, also in the artefact of its
compile cache, from one object for each input; the check is added to that of one input, so it runs before the engine
does, on every call. ``ge_keep`` makes the graph's end depend on an operator.

Sources: vllm_ascend.ffn_definition, vllm_ascend.ffn_definition_16_bit, vllm_ascend.ffn_definition_w4a8,
vllm_ascend.decode_definition: inputs and attributes, by version in limits/schemas.toml; wheel.ge_custom, wheel.ge_graph,
wheel.ge_symbol_shapes; wheel.fx2ge: _codegen_input.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_lowering.custom_ops import assert_tokens
from moe_lowering.custom_ops.assert_tokens import refusal_of
from moe_lowering.custom_ops.dispatch_ffn_combine import DispatchFfnCombineCall
from moe_lowering.custom_ops.dispatch_gmm_combine_decode import DispatchGmmCombineDecodeCall
from moe_lowering.custom_ops.library import register as register_operator
from moe_lowering.passes.verifier import GENERIC
from moe_lowering.vocabulary import EXPERT_FORMATS

Tensors = Sequence[Any]  # of torchair.ge.Tensor: edges of the GE graph

# Operators whose converter refuses, and the reason that it gives.
REFUSED = {
    "mega_moe": "no GE converter: all ranks make its symmetric buffer together at the first call, which is no part of a graph",
}
# What each operator becomes: one of these.
TYPES = {
    "dispatch_ffn_combine": ("DispatchFFNCombineBF16", "DispatchFFNCombine", "DispatchFFNCombineW4A8"),
    "dispatch_gmm_combine_decode": ("DispatchGmmCombineDecode",),
}
VARIANTS = dict(zip(("none", "w8a8", "w4a8"), TYPES["dispatch_ffn_combine"], strict=True))


class ConversionError(RuntimeError):
    """An operator cannot become the one that is registered with GE."""


# -------------------------------------------------------------------------------------------------- operators for GE only


def _check(x: Tensor, lo: int, hi: int, source: str, *, min_tokens: int = 0, max_tokens: int = 0) -> None:
    assert_tokens._real(x, lo, hi, min_tokens=min_tokens, max_tokens=max_tokens)


def _fake_check(x: Tensor, lo: int, hi: int, source: str, *, min_tokens: int = 0, max_tokens: int = 0) -> None:
    assert_tokens._fake(x, lo, hi)


def _do_nothing(x: Tensor) -> None:
    """The result is a control edge of the GE graph."""


register_operator(
    "ge_assert_tokens(Tensor x, int lo, int hi, str source, *, int min_tokens=0, int max_tokens=0) -> ()",
    cpu=_check,
    npu=_check,
    fake=_fake_check,
    side_effect=True,
)
register_operator("ge_keep(Tensor x) -> ()", cpu=_do_nothing, npu=_do_nothing, fake=_do_nothing, side_effect=True)


# ----------------------------------------------------------------------------------------------------------- registration


@functools.cache
def register() -> None:
    """Give torchair the converters, once. Generic operators get one that raises: without any, torchair would generate
    and compile a call-back for each of them before the lowering runs (custom_op_pre_scan.py)."""
    from torchair import register_fx_node_ge_converter as converter

    ops = torch.ops.moe_lowering
    converter(ops.ge_assert_tokens.default)(_convert_assert_tokens)
    converter(ops.ge_keep.default)(_convert_keep)
    converter(ops.dispatch_ffn_combine.default)(_convert_dispatch_ffn_combine)
    if hasattr(ops, "dispatch_gmm_combine_decode"):
        converter(ops.dispatch_gmm_combine_decode.default)(_convert_dispatch_gmm_combine_decode)
    for name in (*GENERIC, "assert_tokens", *(name for name in REFUSED if hasattr(ops, name))):
        converter(getattr(ops, name).default)(_make_refusing_converter(name))


def _make_refusing_converter(name: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        reason = REFUSED.get(name, "the lowering left it in the graph; torchair_config's hook says why")
        raise ConversionError(f"{name}: {reason}")

    return refuse


def missing_ir(name: str) -> str:
    """Why the GE operator that ``name`` becomes cannot be used here; "" when it can, or when ``name`` becomes none."""
    failures = [_ir_failure(type_) for type_ in TYPES.get(name, ())]
    return failures[0] if failures and all(failures) else ""


def _ir_failure(type_: str) -> str:
    from torchair.core import _torchair

    status = _torchair.get_registered_ir_def(type_)[0]
    if status == "SUCCESS":
        return ""
    why = "CANN's GE library is not there" if status == "None" else "its provider's operator package is not installed"
    return f"no IR {type_} is registered with GE: {why}"


# ------------------------------------------------------------------------------------------------------- fused operators


def _convert_dispatch_ffn_combine(*arguments: Any, meta_outputs: Any = None, **named: Any) -> Any:
    """moe_lowering.dispatch_ffn_combine: what its device kernel gives the provider, after ``ge_rewrites.simplify_fused``."""
    from torchair.ge import attr

    call = DispatchFfnCombineCall[Any](*arguments, **named)
    biased = EXPERT_FORMATS[call.quantisation].has_scale_bias
    inputs = {
        "a": call.x,
        "w1": list(call.w13),
        "w2": list(call.w2),
        "expertIdx": _own_ids(call.ids, call.mask),
        "scale1": _in_form(call.w13, call.w13_scale) or [_empty("int64")],
        "scale2": _in_form(call.w13, call.w2_scale) or [_empty("int64")],
        "bias1": _in_form(call.w13, call.w13_scale_bias) if biased else None,
        "bias2": _in_form(call.w13, call.w2_scale_bias) if biased else None,
        "probs": call.weights,
        "xActiveMaskOptional": call.mask,
    }
    # transB and weightNz as aclnnDispatchFFNCombine* sets them; M is max_output_size.
    attributes = {
        "group": attr.Str(call.group),
        "M": attr.Int(call.max_output_size),
        "transB": attr.Bool(False),
        "weightNz": attr.Bool(True),
    }
    if call.swiglu_limit > 0:
        attributes["swigluLimit"] = attr.Float(call.swiglu_limit)
    name, type_ = "dispatch_ffn_combine", VARIANTS[call.quantisation]
    if "worldSize" in _known_attributes(type_):  # from vllm-ascend 0.30 on, and required there
        attributes["worldSize"] = attr.Int(call.ep_size)
    y, counts = _emit_fused(name, type_, inputs, attributes, ("out", "expert_token_nums"))
    return y, counts


def _convert_dispatch_gmm_combine_decode(*arguments: Any, meta_outputs: Any = None, **named: Any) -> Any:
    """moe_lowering.dispatch_gmm_combine_decode: what its device kernel gives the provider, after ``simplify_fused``."""
    from torchair._ge_concrete_graph import ge_apis as ge
    from torchair.ge import attr

    call = DispatchGmmCombineDecodeCall[Any](*arguments, **named)
    no_scale = [] if call.w13_scale else [ge.Cast(ge.Const([1.0]), dst_type=call.x.dtype)]
    inputs = {
        "x": call.x,
        "expert_ids": _own_ids(call.ids, call.mask),
        "gmm1_permuted_weight": list(call.w13),
        "gmm1_permuted_weight_scale": _in_form(call.w13, call.w13_scale) or no_scale,
        "gmm2_weight": list(call.w2),
        "gmm2_weight_scale": _in_form(call.w13, call.w2_scale) or no_scale,
        "expert_scales": call.weights,
        "expert_smooth_scales": None,
        "x_active_mask": call.mask,
    }
    numbers = {
        "ep_rank_size": call.ep_size,
        "ep_rank_id": call.ep_rank,
        "moe_expert_num": call.num_experts,
        "share_expert_num": 1,
        "share_expert_rank_num": 0,
        "quant_mode": 0,
        "global_bs": call.global_bs,
    }
    attributes = {"group_ep": attr.Str(call.group), **{name: attr.Int(value) for name, value in numbers.items()}}
    name = "dispatch_gmm_combine_decode"
    [type_] = TYPES[name]
    y, counts = _emit_fused(name, type_, inputs, attributes, ("output", "expert_token_nums"))
    return y, counts


def _known_attributes(type_: str) -> frozenset[str]:
    """The attributes of the IR that is registered; none where there is no IR, which ``_emit_fused`` refuses."""
    from torchair.core import _torchair

    return frozenset() if _ir_failure(type_) else frozenset(dict(_torchair.get_registered_ir_def(type_)[3]))


def _emit_fused(
    operator: str, type_: str, inputs: dict[str, Any], attributes: dict[str, Any], results: tuple[str, ...]
) -> tuple[Any, ...]:
    """Emit one operator of GE, in the form of its registered IR, and keep it: it communicates.

    Raises:
        ConversionError: there is no IR, or it lacks an input, an attribute or a result that is needed.
    """
    from torchair.core import _torchair
    from torchair.ge import custom_op
    from torchair.ge._ge_graph import dont_prune_me

    failure = _ir_failure(type_)
    if failure:
        raise ConversionError(f"{operator}: {failure}")
    _, known_inputs, known_outputs, known_attributes = _torchair.get_registered_ir_def(type_)
    known = dict(known_inputs)
    present = {name for name, value in inputs.items() if value is not None}
    lacking = (
        (present - set(known))
        | (set(attributes) - set(dict(known_attributes)))
        | (set(results) - set(dict(known_outputs)))
    )
    if lacking:
        raise ConversionError(
            f"{operator}: {', '.join(sorted(lacking))} is needed, and the IR of {type_} that is registered does not have it; "
            "accepted: a newer version of its provider"
        )
    missing = [name for name, kind in known.items() if kind == "required" and name not in present]
    if missing:
        raise ConversionError(
            f"{operator}: the IR of {type_} that is registered needs {', '.join(missing)}, which is not known"
        )
    outputs = list(dict(known_outputs))
    arranged = {name: _as(kind, inputs.get(name), f"{operator}: {name}") for name, kind in known.items()}
    emitted_outputs = custom_op(type_, inputs=arranged, outputs=outputs, attrs=attributes)
    by_name = dict(zip(outputs, emitted_outputs, strict=True))
    dont_prune_me(emitted_outputs[0])
    return tuple(by_name[name] for name in results)


def _as(kind: str, value: Any, name: str) -> Any:
    """An input as the IR takes it: older ones take a tensor where newer ones take a list ("dynamic")."""
    if kind == "dynamic" or not isinstance(value, list):
        return value
    if len(value) != 1:
        raise ConversionError(
            f"{name} is a list of {len(value)}; accepted by the IR that is registered: one stacked tensor"
        )
    return value[0]


def _own_ids(ids: Any, mask: Any) -> Any:
    """The operators write into the ids of masked tokens, and do not say so: they get a copy."""
    from torchair.ge import Clone

    return ids if mask is None else Clone(ids)


def _in_form(weights: Tensors, scales: Tensors | None) -> list[Any]:
    """Scales as one tensor or as a list, whichever the weights are."""
    from torchair._ge_concrete_graph import ge_apis as ge

    if not scales:
        return []
    stacked, together = weights[0].rank == 3, scales[0].rank == 2
    if stacked == together:
        return list(scales)
    if stacked:
        return [ge.Pack(list(scales), N=len(scales), axis=0)]
    return list(ge.Unpack(scales[0], num=len(weights), axis=0))


def _empty(dtype: str) -> Any:
    """A tensor without elements, where the operator wants one and there is none."""
    from torchair._ge_concrete_graph import ge_apis as ge
    from torchair.ge._ge_graph import torch_type_to_ge_type

    return ge.Fill([0], ge.Cast(0.0, dst_type=torch_type_to_ge_type(getattr(torch, dtype))))


# ------------------------------------------------------------------------------------------- checks, and what must be kept


def _convert_keep(x: Any) -> None:
    from torchair.ge._ge_graph import dont_prune_me

    dont_prune_me(x)


def _convert_assert_tokens(x: Any, lo: int, hi: int, source: str, *, min_tokens: int = 0, max_tokens: int = 0) -> None:
    """Attach the check to an input that ``x`` is made from, as that one stays in the graph as long as ``x`` does."""
    from torchair.ge._ge_graph import get_default_ge_graph

    graph = get_default_ge_graph()
    infos = [graph.named_inputs_info[name] for name in _inputs_of(graph, x)]
    if not infos:
        raise ConversionError(
            "ge_assert_tokens: x comes from no input of the graph, so there is nothing to attach it to"
        )
    tensors = [info for info in infos if info.value_type.name == "TENSOR"]
    info = (tensors or infos)[0]
    info.func = _check_input(info.func, _check_line(lo, hi, source, refusal_of(lo, hi, min_tokens, max_tokens)))


def _check_line(lo: int, hi: int, source: str, fault: str) -> str:
    message = f"'assert_tokens: T is ' + str({source}) + {', but ' + fault!r}"
    return f"if not {lo} <= ({source}) <= {hi}: raise RuntimeError({message})"


def _inputs_of(graph: Any, x: Any) -> list[str]:
    """Names of the graph's inputs that ``x`` is computed from."""
    producers = {op.name: op for op in graph.op}
    names, visited, todo = [], set(), [x.node.name]
    while todo:
        name = todo.pop()
        if name in visited:
            continue
        visited.add(name)
        if producers[name].type == "Data":
            names.append(name)
        todo += [edge.split(":")[0] for edge in producers[name].input if edge and not edge.endswith(":-1")]
    return names


def _check_input(func: Any, line: str) -> Any:
    """What prepares one input of a call, with a line of Python before it."""
    from torchair.ge._ge_graph import _DiscontiguousTensorInput, _TensorInput

    # torchair makes no code for _TensorInput, and looks for _DiscontiguousTensorInput by its class
    base: Any = _DiscontiguousTensorInput if isinstance(func, _DiscontiguousTensorInput) else type(func).__mro__[1]

    class Checked(base):
        def __init__(self) -> None:
            self.__dict__.update(func.__dict__)

        def __call__(self, *args: Any) -> Any:
            return func(*args)

        def codegen(self, ge_idx: int, ge_inputs_name: str) -> str:
            own = "" if type(func) is _TensorInput else func.codegen(ge_idx, ge_inputs_name)
            return f"{line}\n{own}" if own else line

    return Checked()
