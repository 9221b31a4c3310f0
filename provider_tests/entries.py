"""The documentation of aclnn entries (moe_lowering/limits/schemas.toml), and what was recorded, read by it."""

from __future__ import annotations

import re
import struct
import sys
from importlib import resources
from typing import Any

import recorder
import torch
from torch import Tensor

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PUBLISHED = tomllib.loads((resources.files("moe_lowering.limits") / "schemas.toml").read_text("utf-8"))
# aclDataType, acl_base_rt.h
ACL_DTYPES = {
    torch.float32: 0, torch.float16: 1, torch.int8: 2, torch.int32: 3, torch.int64: 9, torch.bool: 12,
    torch.bfloat16: 27,
}  # fmt: skip

# What vllm-ascend calls a tensor in no format of the device, by its dimensions: NCL, NCHW, NCDHW (csrc/aclnn_torch_adapter).
BASE_FORMATS = {3: 47, 4: 0, 5: 30}
ND, NZ = 2, 29


def is_there(operator: str) -> bool:
    return hasattr(torch.ops._C_ascend, operator)


def real(operator: str) -> torch._ops.OpOverload:
    return getattr(torch.ops._C_ascend, operator).default


def normal(schema: Any) -> str:
    """A schema as text, without what torch prints in one way and reads in another."""
    return re.sub(r"\(\$?\w+!( -> )?\w*\)", "!", str(schema)).replace("_C_ascend::", "")


def published_as(operator: str) -> str:
    """The version under which schemas.toml has the schema that is registered."""
    registered = normal(real(operator)._schema)
    found = [
        entry["version"]
        for entry in PUBLISHED["schema"]
        if entry["operator"] == operator and normal(torch._C.parse_schema(entry["schema"])) == registered
    ]
    assert len(found) == 1, f"{registered} is in schemas.toml {len(found)} times"
    return found[0]


def documented(operator: str, quantisation: str) -> dict[str, Any]:
    """The entry that a call is documented to end in."""
    version = published_as(operator)
    found = [
        entry
        for entry in PUBLISHED["entry"]
        if entry["operator"] == operator and quantisation in entry["quantisation"] and entry["version"] == version
    ]
    assert len(found) == 1, f"{operator}, {quantisation}, {version}: {len(found)} entries"
    return found[0]


def expect_entry(
    call: recorder.Call, entry: dict[str, Any], schema: Any, given: dict[str, Any], results: tuple[Tensor, ...]
) -> None:
    """The recorded call is this entry, and its slots are these arguments of the operator in the documented order.

    Args:
        given: what the operator was called with, by name; what is left out has its default.
        results: what it returned.
    """
    assert call.entry == entry["entry"]
    assert call.ended, "the call has no two results at the end"
    assert call.launched, "the entry was asked for its workspace and then not run"
    kinds = {argument.name: str(argument.type) for argument in schema.arguments}
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    returned = {value.name: result for value, result in zip(schema.returns, results, strict=True)}
    slots, doubles = iter(call.slots), iter(call.doubles)
    for name in entry["arguments"]:
        value = given[name] if name in given else returned[name] if name in returned else defaults[name]
        if kinds.get(name) == "float":
            assert next(doubles) == struct.unpack("<Q", struct.pack("<d", value))[0], name
            continue
        slot = next(slots, None)
        assert slot is not None, f"{name}: there is no slot for it"
        assert (name, read(slot, kinds.get(name, "Tensor"))) == (name, described(value))
    left = list(slots)
    assert not left, f"{len(left)} slots more than are documented, the first is {left[0]}"


def read(slot: dict[str, Any], kind: str) -> Any:
    """A slot as a value of the schema's type."""
    if kind == "str":
        return slot.get("text")
    if kind == "int":
        return slot["number"]
    if slot["number"] == 0:
        return None
    return slot.get("object", slot)


def described(value: Any) -> Any:
    if isinstance(value, Tensor):
        import torch_npu

        format_ = int(torch_npu.get_npu_format(value))
        return {
            "kind": "tensor",
            "dtype": ACL_DTYPES[value.dtype],
            "format": BASE_FORMATS.get(value.dim(), ND) if format_ == ND else format_,
            "offset": value.storage_offset(),
            "data": value.untyped_storage().data_ptr(),
            "sizes": list(value.shape),
            "strides": list(value.stride()),
            "storage": storage_sizes(value, format_),
        }
    if isinstance(value, (list, tuple)):
        return {"kind": "tensors", "members": [described(member) for member in value]}
    return value


def storage_sizes(value: Tensor, format_: int) -> list[int]:
    """What lies in memory: in ND as many elements as the storage holds; in FRACTAL_NZ blocks of 16 rows and 16 columns, 32
    of int8, as torch_npu lays them out (also of int32)."""
    if format_ == ND:
        return [value.untyped_storage().nbytes() // value.element_size()]
    columns = 32 if value.element_size() == 1 else 16
    rest, rows, width = list(value.shape[:-2]), value.shape[-2], value.shape[-1]
    return [*rest, -(-width // columns), -(-rows // 16), 16, columns]
