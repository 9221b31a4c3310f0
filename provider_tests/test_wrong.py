"""What is wrong on purpose is seen: by torch, by the order of the arguments, by shapes."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import pytest
import recorder
import torch
from entries import documented, expect_entry, is_there, real
from forms import DECODE, FFN, NZ, Form, call_of
from test_calls import expect_like_fake, run
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

FORMS = [
    Form(
        operator,
        quantisation,
        masked=quantisation != "none",
        limit=2.5 if operator == FFN and quantisation != "none" else 0.0,
    )
    for operator, quantisations in ((FFN, ("none", "w8a8", "w4a8")), (DECODE, ("none", "w8a8")))
    for quantisation in quantisations
    if is_there(operator)
]


def distinct_call(form: Form) -> dict[str, Any]:
    """Arguments of the real operator of which no two are equal, so that no two can be exchanged unseen."""
    seen, _, _ = run(form, call_of(form))
    del seen[""]
    number = iter(range(100, 200))
    # the operator computes with these: experts per rank is 12 / (5 - 1)
    fixed = {"ep_rank_size": 5, "shared_expert_rank_num": 1, "moe_expert_num": 12, "ep_rank_id": 3}
    for argument in real(form.operator)._schema.arguments:
        kind, value = str(argument.type), seen.get(argument.name)
        if kind == "int":
            seen[argument.name] = fixed.get(argument.name, next(number))
        elif kind == "str":
            seen[argument.name] = "a group"
        elif kind in ("Tensor", "Optional[Tensor]") and value is None:
            seen[argument.name] = torch.ones(3, next(number), device="npu")
        elif kind == "List[Tensor]" and value[0].numel() < 2:  # what stands for no scale
            seen[argument.name] = [torch.ones(next(number), device="npu").to(value[0].dtype)]
    return seen


def distinct(form: Form) -> tuple[dict[str, Any], tuple[Tensor, ...], recorder.Call]:
    given = distinct_call(form)
    results = real(form.operator)(**given)
    [call] = recorder.taken()
    return given, tuple(results), call


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_any_other_order_is_seen(form: Form) -> None:
    """Each two arguments exchanged, each left out, one more. A float is in registers of its own: its place is not visible."""
    given, results, call = distinct(form)
    schema, entry = real(form.operator)._schema, documented(form.operator, form.quantisation)
    expect_entry(call, entry, schema, given, results)
    floats = {argument.name for argument in schema.arguments if str(argument.type) == "float"}
    names, wrong = entry["arguments"], []
    for i, first in enumerate(names):
        if first not in floats:
            wrong.append([*names[:i], *names[i + 1 :]])
            wrong.append([*names[:i], first, *names[i:]])
        for j in range(i + 1, len(names)):
            if not {first, names[j]} & floats:
                wrong.append([*names[:i], names[j], *names[i + 1 : j], first, *names[j + 1 :]])
    for arguments in wrong:
        with pytest.raises(AssertionError):
            expect_entry(call, {**entry, "arguments": arguments}, schema, given, results)
    assert len(wrong) > 50


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_another_entry_another_value_and_no_launch_are_seen(form: Form) -> None:
    given, results, call = distinct(form)
    schema, entry = real(form.operator)._schema, documented(form.operator, form.quantisation)
    for wrong in (
        dataclasses.replace(call, entry="aclnnAnother"),
        dataclasses.replace(call, launched=False),
        dataclasses.replace(call, ended=False),
    ):
        with pytest.raises(AssertionError):
            expect_entry(wrong, entry, schema, given, results)
    for name in entry["arguments"]:
        value = given.get(name)
        other = {int: 999, str: "another group", float: 3.5}.get(type(value), torch.ones(2, device="npu"))
        where = {"given": {**given, name: other}, "results": results}
        if name in {r.name for r in schema.returns} and name not in given:
            place = [r.name for r in schema.returns].index(name)
            where = {"given": given, "results": (*results[:place], other, *results[place + 1 :])}
        with pytest.raises(AssertionError):
            expect_entry(call, entry, schema, **where)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_the_schema_does_not_take(form: Form) -> None:
    """Nothing reaches an entry then."""
    given, operator = distinct_call(form), real(form.operator)
    recorder.taken()
    text, number, tensor, tensors = (
        next(a.name for a in operator._schema.arguments if str(a.type) == kind)
        for kind in ("str", "int", "Tensor", "List[Tensor]")
    )
    changes: list[dict[str, Any]] = [
        {"no_such_argument": 1}, {text: 3}, {number: "three"}, {number: 2.5}, {tensor: given[tensors]}, {tensors: given[tensor]},
        {tensors: [None]},
    ]  # fmt: skip
    for change in changes:
        with pytest.raises((RuntimeError, TypeError)):
            operator(**{**given, **change})
    with pytest.raises(RuntimeError, match="missing value for argument"):
        operator(**{name: value for name, value in given.items() if name != tensors})
    assert recorder.taken() == []
    operator(**given)
    assert len(recorder.taken()) == 1
    # Torch takes None for a tensor, we do not
    with pytest.raises(ValueError, match="weights is None; accepted: a tensor"):
        getattr(torch.ops.moe_lowering, form.operator)(**{**call_of(form), "weights": None})
    assert recorder.taken() == []


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_another_shape_dtype_and_stride_are_seen(form: Form) -> None:
    _, (y, counts), _ = run(form, call_of(form))
    expect_like_fake(form, (y, counts))
    other_counts = counts.to(torch.int64 if counts.dtype == torch.int32 else torch.int32)
    for wrong in (
        (y[1:], counts),
        (y.float(), counts),
        (y.t().contiguous().t(), counts),
        (y, other_counts),
        (y, counts[1:]),
    ):
        with pytest.raises(AssertionError):
            expect_like_fake(form, wrong)


def test_a_call_without_an_end_is_said_to_have_none() -> None:
    library = recorder._recorder
    assert library is not None
    numbers = list(range(1, 29))  # as many as are looked at: what lies behind them on the stack is not the caller's
    library.aclnnDispatchFFNCombineGetWorkspaceSize(*map(ctypes.c_long, numbers))
    [call] = recorder.taken()
    assert not call.ended and not call.launched and [slot["number"] for slot in call.slots] == numbers


@pytest.mark.parametrize("form", [dataclasses.replace(form, weight_format=NZ) for form in FORMS], ids=str)
def test_the_format_of_the_weights_is_seen(form: Form) -> None:
    """FRACTAL_NZ weights arrive as such, with the sizes of their blocks; as ND they would not be what is expected."""
    seen, _, call = run(form, call_of(form))
    results = seen.pop("")
    schema, entry = real(form.operator)._schema, documented(form.operator, form.quantisation)
    expect_entry(call, entry, schema, seen, tuple(results))
    first = next(slot["object"]["members"][0] for slot in call.slots if slot.get("object", {}).get("kind") == "tensors")
    assert first["format"] == NZ and len(first["storage"]) == 5 and first["storage"][-2] == 16
    plain = {n: [w.clone() for w in v] if n.endswith(("weight1", "weight2", "_weight")) else v for n, v in seen.items()}
    with pytest.raises(AssertionError):
        expect_entry(call, entry, schema, plain, tuple(results))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_only_our_wrapper_keeps_a_symbolic_token_count(form: Form) -> None:
    """The real meta kernel of dispatch_gmm_combine_decode fixes T, so a graph that calls it is compiled again for each; that of
    dispatch_ffn_combine does not, and our fake kernels do not."""
    seen, _, _ = run(form, call_of(form))
    del seen[""]
    fixes = form.operator == DECODE
    assert symbolic(torch.ops.moe_lowering, form.operator, call_of(form))
    assert symbolic(torch.ops._C_ascend, form.operator, seen) != fixes


def symbolic(namespace: Any, operator: str, arguments: dict[str, Any]) -> bool:
    """Whether the first result of a call has as many rows as x when T is a symbol."""
    names = [name for name, value in arguments.items() if isinstance(value, Tensor)]

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return getattr(namespace, operator)(**{**arguments, **dict(zip(names, tensors, strict=True))})

    graph = make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(
        *(arguments[name] for name in names)
    )
    [rows] = [
        n.meta["val"][0].shape[0]
        for n in graph.graph.nodes
        if getattr(n.target, "name", str)().endswith(f"::{operator}")
    ]
    return isinstance(rows, torch.SymInt)
