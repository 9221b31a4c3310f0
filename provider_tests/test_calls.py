"""Each form of each wrapper's call is taken by the real operator, and arrives in the aclnn entry that is documented."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import forms
import pytest
import recorder
import torch
from entries import documented, expect_entry, is_there, real
from forms import MODULES, Form, call_of
from torch import Tensor

THERE = [operator for operator in MODULES if is_there(operator)]
FORMS = [form for operator in THERE for form in forms.forms(operator)]


@contextlib.contextmanager
def watched(operator: str) -> Iterator[dict[str, Any]]:
    """What the wrapper calls the real operator with, by name, and what that returns (``""``)."""
    module, seen, keep = MODULES[operator], {}, MODULES[operator].find_provider_operator

    def find_provider_operator(name: str) -> tuple[Any, frozenset[str]]:
        overload, names = keep(name)

        def watching(**given: Any) -> Any:
            seen.update(given)
            seen[""] = overload(**given)
            return seen[""]

        return watching, names

    module.find_provider_operator = find_provider_operator
    try:
        yield seen
    finally:
        module.find_provider_operator = keep


def run(form: Form, arguments: dict[str, Any]) -> tuple[dict[str, Any], tuple[Tensor, Tensor], recorder.Call]:
    with watched(form.operator) as seen:
        results = forms.call(form, arguments)
    [call] = recorder.taken()
    return seen, results, call


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_call(form: Form) -> None:
    arguments = call_of(form)
    ids = arguments["ids"].cpu()
    seen, (y, counts), call = run(form, arguments)
    returned = seen.pop("")
    expect_entry(call, documented(form.operator, form.quantisation), real(form.operator)._schema, seen, tuple(returned))
    assert torch.equal(arguments["ids"].cpu(), ids)
    expect_like_fake(form, (y, counts))
    for given, passed in weights_of(form, arguments, seen):
        assert [w.data_ptr() for w in given] == [w.data_ptr() for w in passed]  # no copy of the weights


def weights_of(form: Form, arguments: dict[str, Any], seen: dict[str, Any]) -> list[tuple[list[Tensor], list[Tensor]]]:
    names = {forms.FFN: ("weight1", "weight2"), forms.DECODE: ("gmm1_permuted_weight", "gmm2_weight")}[form.operator]
    return [(arguments[ours], seen[theirs]) for ours, theirs in zip(("w13", "w2"), names, strict=True)]


def expect_like_fake(form: Form, found: tuple[Tensor, ...]) -> None:
    """Shape, dtype and strides are those that our fake kernel gives."""
    fakes = forms.call(form, call_of(form, "meta"))
    assert [like(t) for t in found] == [like(t) for t in fakes]


def like(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype, tuple[int, ...]]:
    return tuple(tensor.shape), tensor.dtype, tensor.stride()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_metas(form: Form) -> None:
    """The real operator's meta kernel, with the arguments that the wrapper gives it, against our fake kernel."""
    seen, _, _ = run(form, call_of(form))
    eager = seen.pop("")
    on_meta = {name: to_meta(value) for name, value in seen.items()}
    metas = real(form.operator)(**on_meta)
    assert [like(t) for t in metas] == [like(t) for t in eager]
    expect_like_fake(form, tuple(metas))
    if form.operator == forms.FFN:  # it returns its outputs once more
        assert metas[0] is on_meta["out"] and metas[1] is on_meta["expert_token_nums"]


def to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return [to_meta(member) for member in value] if isinstance(value, list) else value


@pytest.mark.parametrize("operator", THERE)
def test_forms_hold_every_word(operator: str) -> None:
    """The forms hold each quantisation that the fake kernel takes, each scale dtype and each dtype of tokens."""
    here = forms.forms(operator)
    assert len(here) > 50
    accepted = {q for q in forms.FORMATS if q != "w4a8" or operator == forms.FFN}
    assert {form.quantisation for form in here} == accepted
    assert {form.scale_dtype for form in here} == set(MODULES[operator].SCALES) | {torch.float32}
    assert {form.dtype for form in here} == set(forms.HALVES)
