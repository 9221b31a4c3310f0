"""The device kernels of our wrappers against every published schema of the operators that they call.

Each schema of limits/schemas.toml is registered as a look-alike that records its arguments by name and fills its outputs.
torch refuses an argument that a schema does not have, and a missing one, so each call that arrives agrees with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from provider_calls import EXPERTS, MASK, PUBLISHED, bits, call_of, equal_lists, expect_result, on_npu
from torch import Tensor

from moe_lowering.custom_ops import dispatch_ffn_combine, dispatch_gmm_combine_decode, mega_moe

pytestmark = pytest.mark.xdist_group("look_alikes")  # one process: one look-alike of a name at a time


def versions(operator: str) -> list[Any]:
    return [pytest.param(s, id=s["version"]) for s in PUBLISHED["schema"] if s["operator"] == operator]


def version(operator: str, name: str) -> dict[str, str]:
    return next(s for s in PUBLISHED["schema"] if s["operator"] == operator and s["version"] == name)


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
