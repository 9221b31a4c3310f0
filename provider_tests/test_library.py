"""What the installed wheel holds, and what the package says of it."""

from __future__ import annotations

import pytest
import recorder
import torch
from entries import PUBLISHED, documented, is_there, published_as, real
from forms import FFN, MODULES, Form, call, call_of

from moe_lowering.custom_ops.fused import FORMATS
from moe_lowering.custom_ops.missing_operators import why_absent
from moe_lowering.limits import limits_for
from moe_lowering.providers import installed_providers
from moe_lowering.simulator import standins

[PACKAGE] = [package for package in installed_providers() if package.name == recorder.PACKAGE]


def removed(operator: str) -> bool:
    rows = limits_for(operator, "A3", {PACKAGE.name: PACKAGE.version})
    return any(row.code.endswith(".removed") for row in rows)


@pytest.mark.parametrize("operator", MODULES)
def test_an_operator_is_there_or_the_package_says_that_it_was_removed(operator: str) -> None:
    """By name and version, by the rule and by the wrapper on the device; nothing is recorded then."""
    assert is_there(operator) != removed(operator)
    if is_there(operator):
        assert published_as(operator)
        return
    assert f"vllm_ascend {PACKAGE.version} has no {operator}: removed in" in why_absent(operator)
    with pytest.raises(RuntimeError, match=f"vllm_ascend {PACKAGE.version} has no {operator}"):
        call(form := Form(operator, "w8a8"), call_of(form))
    assert recorder.taken() == []


def test_the_newer_one_is_there() -> None:
    assert is_there(FFN)


def test_the_build_is_read() -> None:
    """The wheels are builds for A2, and what they carry for CANN has no fused entry: the first call fails on a device."""
    assert PACKAGE.build == "A2"
    [opapi] = recorder.home().rglob("libcust_opapi.so")
    defined = standins.read_symbols("nm", opapi, "-D", "--defined-only")
    assert any(name.startswith("aclnnMoe") for name in defined)
    assert not defined & {entry["entry"] for entry in PUBLISHED["entry"]}


@pytest.mark.parametrize("operator", [operator for operator in MODULES if is_there(operator)])
def test_every_documented_entry_is_looked_up(operator: str) -> None:
    """And each names arguments and results of the schema."""
    found = [documented(operator, q) for q in FORMATS if q != "w4a8" or operator == FFN]
    schema = real(operator)._schema
    names = {value.name for value in (*schema.arguments, *schema.returns)}
    for entry in found:
        assert entry["entry"] in recorder.entries()
        assert set(entry["arguments"]) <= names and len(set(entry["arguments"])) == len(entry["arguments"])


@pytest.mark.parametrize("operator", [operator for operator in MODULES if is_there(operator)])
def test_kernels(operator: str) -> None:
    """For the device and for shapes, none for CPU."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = ("PrivateUse1", "Meta", "CPU")
    assert [has(f"_C_ascend::{operator}", key) for key in keys] == [True, True, False]
