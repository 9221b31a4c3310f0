"""The device kernels of our wrappers against every published schema of the operators that they call.

Each schema of limits/schemas.toml is registered as a look-alike that records its arguments by name and fills its outputs.
torch refuses an argument that a schema does not have, and a missing one, so each call that arrives agrees with it.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from importlib import resources
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fused_layers import HIDDEN, lists_of, make_layer, make_tokens
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_lowering.custom_ops import dispatch_ffn_combine, dispatch_gmm_combine_decode, mega_moe
from moe_lowering.custom_ops.dispatch_ffn_combine import DispatchFfnCombineCall
from moe_lowering.custom_ops.dispatch_gmm_combine_decode import DispatchGmmCombineDecodeCall
from moe_lowering.custom_ops.mega_moe import MegaMoeCall

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.xdist_group("look_alikes")  # one process: one look-alike of a name at a time
PUBLISHED = tomllib.loads((resources.files("moe_lowering.limits") / "schemas.toml").read_text("utf-8"))
EXPERTS = 6
MASK = torch.tensor([True, False, True, True])


def versions(operator: str) -> list[Any]:
    return [pytest.param(s, id=s["version"]) for s in PUBLISHED["schema"] if s["operator"] == operator]


def version(operator: str, name: str) -> dict[str, str]:
    return next(s for s in PUBLISHED["schema"] if s["operator"] == operator and s["version"] == name)


CALLS: dict[types.ModuleType, Any] = {
    dispatch_ffn_combine: DispatchFfnCombineCall,
    dispatch_gmm_combine_decode: DispatchGmmCombineDecodeCall,
    mega_moe: MegaMoeCall,
}


@contextlib.contextmanager
def look_alike(published: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The operator in ``_C_ascend`` for CPU tensors; yields what it was called with, by name."""
    seen: dict[str, Any] = {}
    name = published["operator"]

    def ffn(*args: Any) -> Any:
        seen.update(zip(names, args, strict=False))  # the dispatcher leaves trailing defaults out
        seen["out"].fill_(3)
        seen["out"][1] = torch.nan  # the row of the masked token
        if "expert_token_nums" in seen:
            seen["expert_token_nums"].copy_(torch.arange(1, 1 + seen["expert_token_nums"].numel()))
        seen["expert_idx"].fill_(EXPERTS)  # what the operator does to masked tokens
        wrong = torch.zeros_like(seen["out"])  # returns are not to be used
        return (wrong, torch.zeros(3, dtype=torch.int32)) if "expert_token_nums" in seen else wrong

    def decode(*args: Any) -> tuple[Tensor, Tensor]:
        seen.update(zip(names, args, strict=False))
        y = torch.full_like(seen["x"], 3)
        y[1] = torch.nan
        seen["expert_ids"].fill_(EXPERTS)
        return y, torch.arange(1, 4)

    with torch.library._scoped_library("_C_ascend", "FRAGMENT") as library:
        library.define(published["schema"])
        library.impl(name, {"dispatch_ffn_combine": ffn}.get(name, decode), "CPU")
        schema = getattr(torch.ops._C_ascend, name).default._schema
        names = [argument.name for argument in schema.arguments]
        yield seen


def on_npu(wrapper: types.ModuleType, **arguments: Any) -> tuple[Tensor, Tensor]:
    """What the kernel for the device makes of these arguments."""
    return wrapper._npu(CALLS[wrapper](**arguments))


def call_of(operator: str, quantisation: str, *, lists: bool = False, masked: bool = False) -> dict[str, Any]:
    layer = make_layer(quantisation, EXPERTS, torch.bfloat16)
    x, weights, ids = make_tokens(0, 4, EXPERTS, torch.bfloat16, False)
    call = {**lists_of(layer, 0, 2, lists), "x": x, "ids": ids, "weights": weights, "group": "mc2", "ep_size": 2}
    if masked:
        call["mask"] = MASK
    return call


def expect_result(y: Tensor, x: Tensor, masked: bool) -> None:
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert (y[[0, 2, 3]] == 3).all()
    assert (y[1] == 0).all() if masked else y[1].isnan().all()


# ------------------------------------------------------------------------------------------------- dispatch_ffn_combine


def bits(scale: Tensor) -> Tensor:
    return scale.view(torch.int32).long()


def on_ffn(
    published: dict[str, str], quantisation: str, **options: Any
) -> tuple[dict[str, Any], dict[str, Any], Tensor]:
    call, limit = call_of("", quantisation, lists=options.get("lists", False), masked=options.get("masked", False)), 0.0
    if options.get("limit"):
        call["swiglu_limit"] = limit = 2.5
    before = call["ids"].clone()
    with look_alike(published) as seen:
        y, counts = on_npu(dispatch_ffn_combine, max_output_size=77, quantisation=quantisation, **call)
    assert torch.equal(call["ids"], before)
    expect_result(y, call["x"], "mask" in call)
    assert seen["max_output_size"] == 77 and seen["group"] == "mc2"
    assert torch.equal(seen["x"], call["x"]) and torch.equal(seen["probs"], call["weights"])
    assert seen["expert_idx"].dtype == torch.int32 and seen["probs"].dtype == torch.float32
    assert seen.get("swiglu_limit", 0.0) == limit
    assert seen.get("world_size", 2) == 2  # that of the group: the schema's default is none that the operator takes
    for name, given in (("weight1", "w13"), ("weight2", "w2")):
        assert [w.data_ptr() for w in seen[name]] == [w.data_ptr() for w in call[given]]
    return seen, call, counts


def equal_lists(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("published", versions("dispatch_ffn_combine"))
@pytest.mark.parametrize("lists", [False, True])
def test_dispatch_ffn_combine_w8a8(published: dict[str, str], lists: bool) -> None:
    seen, call, counts = on_ffn(published, "w8a8", lists=lists)
    for name, given in (("scale1", "w13_scale"), ("scale2", "w2_scale")):
        assert equal_lists(seen[name], [bits(scale) for scale in call[given]])
    has_counts = "expert_token_nums" in published["schema"]
    assert counts.dtype == torch.int32
    assert counts.tolist() == ([1, 2, 3] if has_counts else [-1, -1, -1])
    if "bias1" in published["schema"]:
        assert [[(t.dtype, tuple(t.shape)) for t in seen[n]] for n in ("bias1", "bias2")] == 2 * [
            [(torch.float32, (0,))]
        ]


MAIN = version("dispatch_ffn_combine", "vllm-ascend 0.20.2 to 0.29")
FIRST = version("dispatch_ffn_combine", "vllm-ascend 0.13")


def test_dispatch_ffn_combine_w4a8_mask_and_limit() -> None:
    seen, call, counts = on_ffn(MAIN, "w4a8", masked=True, limit=True)
    assert torch.equal(seen["x_active_mask"], MASK)
    assert equal_lists(seen["bias1"], call["w13_scale_bias"]) and equal_lists(seen["bias2"], call["w2_scale_bias"])
    assert counts.tolist() == [1, 2, 3]


@pytest.mark.parametrize("published", versions("dispatch_ffn_combine")[1:])
def test_dispatch_ffn_combine_in_16_bits(published: dict[str, str]) -> None:
    seen, _, counts = on_ffn(published, "none")
    assert [[(t.dtype, tuple(t.shape)) for t in seen[n]] for n in ("scale1", "scale2")] == 2 * [[(torch.int64, (0,))]]
    assert seen.get("x_active_mask") is None and counts.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("published", "quantisation", "options", "message"),
    [
        (FIRST, "none", {}, "16-bit weights is asked for"),
        (FIRST, "w4a8", {}, "quantisation 'w4a8' is asked for"),
        (
            FIRST,
            "w8a8",
            {"masked": True},
            "mask is asked for, and the operator that is registered has no argument x_active",
        ),
        (FIRST, "w8a8", {"limit": True}, "swiglu_limit is asked for"),
        (versions("dispatch_ffn_combine")[1].values[0], "w8a8", {"limit": True}, "swiglu_limit is asked for"),
        (versions("dispatch_ffn_combine")[1].values[0], "w4a8", {}, "no argument bias1; accepted: a newer vllm-ascend"),
    ],
)
def test_what_an_old_version_cannot_say_is_refused(
    published: dict[str, str], quantisation: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(NotImplementedError, match=message):
        on_ffn(published, quantisation, **options)


def test_scales_take_the_form_of_the_weights() -> None:
    """A stacked scale beside a list of weights, and the other way round; the bits of int64 stay."""
    call = call_of("", "w8a8", lists=True)
    stacked = torch.stack(call["w13_scale"])
    with look_alike(MAIN) as seen:
        mixed = {**call, "w13_scale": [stacked], "w2_scale": [bits(s) for s in call["w2_scale"]]}
        on_npu(dispatch_ffn_combine, max_output_size=77, quantisation="w8a8", **mixed)
        assert equal_lists(seen["scale1"], [bits(s) for s in call["w13_scale"]])
        assert equal_lists(seen["scale2"], mixed["w2_scale"])
        whole = call_of("", "w8a8")
        on_npu(
            dispatch_ffn_combine, max_output_size=77, quantisation="w8a8", **{**whole, "w13_scale": call["w13_scale"]}
        )
        assert equal_lists(seen["scale1"], [bits(stacked)])


def test_widened_scales_leave_the_high_half_empty() -> None:
    """Hardware reads flags there; a negative float32 would fill it when it is widened as a signed number."""
    call = call_of("", "w8a8")
    call["w2_scale"][0][0, 0] = -1.5
    with look_alike(MAIN) as seen:
        on_npu(dispatch_ffn_combine, max_output_size=77, quantisation="w8a8", **call)
    assert (seen["scale2"][0] >> 32 == 0).all()
    assert seen["scale2"][0][0, 0].item() == 0xBFC00000


# ------------------------------------------------------------------------------------------- dispatch_gmm_combine_decode


@pytest.mark.parametrize("published", versions("dispatch_gmm_combine_decode"))
@pytest.mark.parametrize(("quantisation", "masked"), [("w8a8", True), ("none", False)])
def test_dispatch_gmm_combine_decode(published: dict[str, str], quantisation: str, masked: bool) -> None:
    call = call_of("", quantisation, masked=masked)
    before = call["ids"].clone()
    with look_alike(published) as seen:
        y, counts = on_npu(dispatch_gmm_combine_decode, ep_rank=1, num_experts=EXPERTS, global_bs=10, **call)
    assert torch.equal(call["ids"], before)
    expect_result(y, call["x"], masked)
    assert (counts.dtype, counts.tolist()) == (torch.int64, [1, 2, 3])
    expected = {
        "group_ep": "mc2", "ep_rank_size": 2, "ep_rank_id": 1, "moe_expert_num": EXPERTS, "shared_expert_num": 1,
        "shared_expert_rank_num": 0, "quant_mode": 0, "global_bs": 10, "expert_smooth_scales": None,
    }  # fmt: skip
    assert {name: seen[name] for name in expected} == expected
    assert torch.equal(seen["expert_scales"], call["weights"])
    assert equal_lists(seen["gmm1_permuted_weight"], call["w13"]) and equal_lists(seen["gmm2_weight"], call["w2"])
    one = [torch.ones(1).bfloat16()]
    assert equal_lists(seen["gmm1_permuted_weight_scale"], call.get("w13_scale", one))
    assert equal_lists(seen["gmm2_weight_scale"], call.get("w2_scale", one))
    assert seen["x_active_mask"] is None if not masked else torch.equal(seen["x_active_mask"], MASK)


def test_without_a_provider() -> None:
    for wrapper, name, extra in (
        (dispatch_ffn_combine, "dispatch_ffn_combine", {"max_output_size": 8, "quantisation": "w8a8"}),
        (dispatch_gmm_combine_decode, "dispatch_gmm_combine_decode", {"ep_rank": 0, "num_experts": EXPERTS}),
    ):
        with pytest.raises(
            RuntimeError, match=f"^{name}: torch.ops._C_ascend.{name} is not there; install vllm-ascend"
        ):
            on_npu(wrapper, **call_of("", "w8a8"), **extra)
    sizes = {"num_experts": EXPERTS, "max_tokens": 8, "max_rows": 0}
    with pytest.raises(RuntimeError, match=r"^mega_moe: cann_ops_transformer.ops cannot be imported"):
        on_npu(mega_moe, **call_of("", "none", lists=True), **sizes)


# --------------------------------------------------------------------------------------------------------------- mega_moe


@pytest.fixture
def group() -> Iterator[str]:
    """A process group of two ranks in one process, without communication."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield dist.group.WORLD.group_name  # type: ignore[union-attr]
    dist.destroy_process_group()
    mega_moe._BUFFERS.clear()


def module_of(published: dict[str, Any], seen: list[tuple[str, dict[str, Any]]]) -> types.ModuleType:
    """Functions with the published signatures, that record their arguments by name."""

    def record(name: str, given: dict[str, Any]) -> Any:
        seen.append((name, given))
        if name != "mega_moe":
            return object()
        y = torch.full_like(given["x"], 3)
        y[1] = torch.nan
        given["topk_ids"].fill_(EXPERTS)
        return y, torch.tensor([1, 2, 3], dtype=torch.int32)

    module = types.ModuleType("cann_ops_transformer.ops")
    for function in published["functions"]:
        name = function.split("(")[0]
        exec(f"def {function}: return record({name!r}, dict(locals()))", {"record": record}, module.__dict__)
    return module


def signatures() -> list[Any]:
    return [pytest.param(s, id=s["version"]) for s in PUBLISHED["signature"]]


def present(published: dict[str, Any]) -> bool:
    return "topk_weights_type" in published["functions"][0]


@pytest.mark.parametrize("published", signatures())
@pytest.mark.parametrize("quantisation", ["none", "w8a8", "w4a8"])
def test_mega_moe(published: dict[str, Any], quantisation: str, group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setitem(sys.modules, "cann_ops_transformer.ops", module_of(published, seen))
    call = {**call_of("", quantisation, lists=True, masked=True), "group": group}
    rest = {"num_experts": EXPERTS, "max_tokens": 8, "quantisation": quantisation, "activation_clamp": 1.5}
    if quantisation == "w4a8" and not present(published):
        with pytest.raises(NotImplementedError, match="reads two int4 in an int8; accepted: a newer one"):
            on_npu(mega_moe, **call, **rest, max_rows=0)
        return
    before = call["ids"].clone()
    for rows in (0, 0, 40):
        y, counts = on_npu(mega_moe, **call, **rest, max_rows=rows)
        expect_result(y, call["x"], True)
        assert (counts.dtype, counts.tolist()) == (torch.int32, [1, 2, 3])
    assert torch.equal(call["ids"], before)
    made = [given for name, given in seen if name != "mega_moe"]
    calls = [given for name, given in seen if name == "mega_moe"]
    assert len(made) == 2 and len(calls) == 3  # a buffer for each set of sizes, made once
    assert calls[0]["sym_buffer"] is calls[1]["sym_buffer"] is not calls[2]["sym_buffer"]
    inner = make_layer("none", 1, torch.bfloat16).stored[1].shape[1]
    mode = (0, None) if quantisation == "none" else (2, torch.int8)
    expected = {
        "group": dist.group.WORLD, "num_experts": EXPERTS, "num_max_tokens_per_rank": 8, "num_topk": 3, "hidden": HIDDEN,
        "intermediate_hidden": inner if present(published) else 2 * inner, "max_recv_token_num": 2 * 8 * 3,
        "dispatch_quant_mode": mode[0], "dispatch_quant_out_dtype": mode[1], "combine_quant_mode": 0, "comm_alg": "",
    }  # fmt: skip
    assert {name: made[0][name] for name in expected} == expected and made[1]["max_recv_token_num"] == 40
    one = calls[0]
    assert torch.equal(one["x_active_mask"], MASK.to(torch.int8)) and one["x_active_mask"].dtype == torch.int8
    assert (one["activation"], one["activation_clamp"]) == ("swiglu", 1.5)
    assert equal_lists(one["l1_weights"], call["w13"]) and equal_lists(one["l2_weights"], call["w2"])
    for name, given in (("l1_weights_sf", "w13_scale"), ("l2_weights_sf", "w2_scale")):
        assert one[name] is None if given not in call else equal_lists(one[name], [bits(s) for s in call[given]])
    for name, given in (("l1_bias", "w13_scale_bias"), ("l2_bias", "w2_scale_bias")):
        assert one[name] is None if given not in call else equal_lists(one[name], call[given])
    assert all(value is None for name, value in one.items() if name.startswith("shared") or name.endswith("_type"))


def test_mega_moe_finds_its_group(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name of the process group, or by that of its HCCL communicator, as MC2 operators take it."""
    seen: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setitem(sys.modules, "cann_ops_transformer.ops", module_of(PUBLISHED["signature"][1], seen))
    call = {**call_of("", "none", lists=True), "num_experts": EXPERTS, "max_tokens": 8, "max_rows": 0}
    with pytest.raises(ValueError, match="ep_group is 'hccl_7', which names no process group"):
        on_npu(mega_moe, **{**call, "group": "hccl_7"})
    monkeypatch.setattr(mega_moe, "_communicator", lambda handle: "hccl_7")
    y, _ = on_npu(mega_moe, **{**call, "group": "hccl_7"})
    assert seen[0][1]["group"] is dist.group.WORLD and y.shape == call["x"].shape
    one_expert = {name: call[name][:1] for name in ("w13", "w2")}
    with pytest.raises(ValueError, match="ep_size is 6, but group 'hccl_7' has 2 ranks"):
        on_npu(mega_moe, **{**call, **one_expert, "group": "hccl_7", "ep_size": 6})


# ------------------------------------------------------------------------------------------------------------------- data


def test_every_published_form_has_a_source() -> None:
    assert {s["operator"] for s in PUBLISHED["schema"]} == {"dispatch_ffn_combine", "dispatch_gmm_combine_decode"}
    for entry in (*PUBLISHED["schema"], *PUBLISHED["signature"]):
        assert entry["source"] and entry["version"]
    for entry in PUBLISHED["schema"]:
        assert torch._C.parse_schema(entry["schema"]).name == entry["operator"]


@pytest.mark.parametrize("published", PUBLISHED["schema"], ids=lambda e: f"{e['operator']}-{e['version']}")
def test_an_argument_that_is_not_known_is_refused(published: dict[str, str]) -> None:
    """A default may be one that the operator refuses, or another meaning; without the argument the call is made."""
    head, arrow, results = published["schema"].partition(") ->")
    newer = {**published, "schema": f"{head}, int novel=0{arrow}{results}"}
    wrapper, extra = {
        "dispatch_ffn_combine": (dispatch_ffn_combine, {"max_output_size": 8, "quantisation": "w8a8"}),
        "dispatch_gmm_combine_decode": (dispatch_gmm_combine_decode, {"ep_rank": 0, "num_experts": EXPERTS}),
    }[published["operator"]]
    with look_alike(newer) as seen:
        with pytest.raises(
            NotImplementedError, match=f"^{published['operator']}: the operator .* has novel, which this"
        ):
            on_npu(wrapper, **call_of("", "w8a8"), **extra)
        assert not seen
    with look_alike(published) as seen:
        on_npu(wrapper, **call_of("", "w8a8"), **extra)
    assert seen and "novel" not in seen


def test_an_argument_that_a_schema_lacks_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look-alike sees mistakes: without the filter by name the call for 0.13 fails."""
    monkeypatch.setattr(dispatch_ffn_combine, "find_provider_operator", lambda name: (
        getattr(torch.ops._C_ascend, name).default, frozenset(a.name for a in torch._C.parse_schema(MAIN["schema"]).arguments)
    ))  # fmt: skip
    with pytest.raises(RuntimeError, match="expected at most 10 argument"):
        on_ffn(FIRST, "w8a8")
