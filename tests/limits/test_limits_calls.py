"""From calls and blocks to the quantities that limit rows read, and the check of calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checklists import forgotten
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._sympy.value_ranges import ValueRanges

import moe_lowering.custom_ops  # noqa: F401  (registers torch.ops.moe_lowering)
from moe_lowering.custom_ops.dispatch_ffn_combine import counts_of_a_row
from moe_lowering.limits import bind, check_call, limits_for, names, quantities
from moe_lowering.limits.calls import CONTEXT, OPERATORS
from moe_lowering.vocabulary import SOCS

npu = torch.ops.npu

# ----------------------------------------------------------------------------------------------------------- quantities


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_every_operator_has_rows_on_every_soc(operator: str) -> None:
    for soc in SOCS:
        assert limits_for(operator, soc), f"{operator} on {soc}"
        assert all(row.source and row.code for row in limits_for(operator, soc))


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_calls_give_every_quantity_that_the_rows_read(operator: str) -> None:
    """A row that reads a quantity under a misspelt name would never apply."""
    given = quantities(operator, arguments_of(operator)).keys() | CONTEXT
    for soc in SOCS:
        missing = names(operator, soc) - given
        assert missing == set(), forgotten("A limit", "moe_lowering/limits/calls/*.py", missing)


def arguments_of(operator: str) -> dict[str, Any]:
    """Some call of the operator, as ``bind`` gives it."""
    x, ids = torch.ones(4, 8), torch.zeros(4, 2, dtype=torch.int32)
    w, ones, counts = torch.ones(2, 8, 8), torch.ones(4), torch.tensor([1, 2])
    group, lists = ("name", 2, 0, 4), ([1, 1], [1, 1])
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "npu_moe_gating_top_k": ((x, 2), {}),
        "npu_moe_gating_top_k_softmax": ((x,), {}),
        "npu_moe_gating_top_k_softmax_v2": ((x,), {}),
        "npu_moe_init_routing": ((x, ids, ids, 4), {}),
        "npu_moe_compute_expert_tokens": ((ids[:, 0], 4), {}),
        "npu_moe_init_routing_v2": ((x, ids), {}),
        "npu_moe_token_permute": ((x, ids), {}),
        "npu_moe_token_unpermute": ((x, ids[:, 0]), {}),
        "npu_moe_re_routing": ((x, ids), {}),
        "npu_moe_finalize_routing": ((x, None, None, None, x, ids[:, 0], None), {}),
        "npu_grouped_matmul": (([x], [w]), {}),
        "npu_swiglu": ((x,), {}),
        "npu_clipped_swiglu": ((x,), {}),
        "npu_dynamic_quant": ((x,), {}),
        "npu_swiglu_quant": ((x,), {}),
        "npu_swiglu_clip_quant": ((x, counts, ones), {}),
        "npu_dequant_swiglu_quant": ((x,), {}),
        "npu_grouped_matmul_swiglu_quant": ((x, w, counts, w[0], ones), {}),
        "npu_grouped_matmul_swiglu_quant_v2": ((x, [w], [w[0]], ones, counts), {}),
        "npu_moe_distribute_dispatch_v2": ((x, ids, *group), {}),
        "npu_moe_distribute_combine_v2": ((x, ids, ids, ids, x, *group), {}),
        "all_to_all_single": ((ones, [2, 2], [2, 2], "name"), {}),
        "all_to_all_single_npu": ((ones, *lists, *lists, "tag", [0, 1], 2), {}),
        "all_gather_into_tensor": ((x, 2, "name"), {}),
        "reduce_scatter_tensor": ((x, "sum", 2, "name"), {}),
        "npu_alltoallv_gmm": ((x, w, "name", 2, *lists), {}),
        "npu_gmm_alltoallv": ((x, w, "name", 2, *lists), {}),
        "dispatch_ffn_combine": ((x, [w], [w], ids, x, "name", 2, 8), {}),
        "dispatch_gmm_combine_decode": ((x, [w], [w], ids, x, "name", 2, 0, 4), {}),
        "mega_moe": ((x, list(w), list(w), ids, x, "name", 2, 4, 8, 0), {}),
    }
    args, kwargs = calls[operator]
    return bind(overload(operator), args, kwargs)


def overload(operator: str) -> torch._ops.OpOverload:
    """The operator of that name, wherever it is registered."""
    import npugraph_ex  # noqa: F401  (defines npu_define)

    for namespace in (npu, torch.ops.custom, torch.ops.moe_lowering, torch.ops._c10d_functional, torch.ops.npu_define):
        if hasattr(namespace, operator):
            return getattr(namespace, operator).default
    raise LookupError(operator)


# ---------------------------------------------------------------------------------------------------------------- calls


def fake_call(low: int, high: int, **kwargs: Any) -> tuple[FakeTensorMode, tuple[Any, ...], dict[str, Any]]:
    """A dispatch of a symbolic number of tokens in [low, high], hint in between."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC], constraint_sizes=[None, None]
    )
    x = mode.from_tensor(torch.empty(16, 1024, dtype=torch.bfloat16), symbolic_context=context)
    mode.shape_env.var_to_range[x.shape[0].node.expr] = ValueRanges(low, high)
    with mode:
        ids = torch.empty(x.shape[0], 2, dtype=torch.int32)
    return mode, (x, ids, "group", 2, 0, 8), kwargs


def test_calls_with_fake_tensors() -> None:
    for high, expected in ((512, []), (600, ["mc2.tokens"])):
        mode, args, kwargs = fake_call(2, high)
        guards = len(mode.shape_env.guards)
        found = check_call(
            npu.npu_moe_distribute_dispatch_v2.default, args, kwargs, soc="A3", extra={"buffer_bytes": 2**30}
        )
        assert [v.code for v in found] == expected
        assert len(mode.shape_env.guards) == guards


def test_a_size_in_an_int_argument_is_refused() -> None:
    mode, args, _ = fake_call(2, 512)
    guards = len(mode.shape_env.guards)
    found = check_call(npu.npu_moe_distribute_dispatch_v2.default, args, {"global_bs": args[0].shape[0] * 2}, soc="A3")
    assert [v.code for v in found] == ["call.symbolic_int"]
    assert "global_bs is 2*s" in found[0].message
    assert len(mode.shape_env.guards) == guards


def test_other_operators_are_not_judged() -> None:
    assert check_call(torch.ops.aten.relu.default, (torch.ones(1),), {}, soc="A3") == []
    assert check_call(npu.npu_fast_gelu.default, (torch.ones(1, 2),), {}, soc="A3") == []


def test_quantised_grouped_matmul_is_left_to_its_own_rules() -> None:
    x, w = torch.ones(4, 8, dtype=torch.int8), torch.ones(2, 8, 16, dtype=torch.int8)
    call = {"group_list": torch.tensor([1, 2]), "group_type": 0, "split_item": 2, "group_list_type": 1}
    scales = {"scale": [torch.ones(2, 16).bfloat16()], "per_token_scale": [torch.ones(4)], "output_dtype": 15}
    assert check_call(npu.npu_grouped_matmul.default, ([x], [w]), {**call, **scales}, soc="A3") == []


def test_bind() -> None:
    bound = bind(npu.npu_swiglu.default, (1,), {"dim": 0})
    assert bound == {"input": 1, "dim": 0}
    assert bind(npu.npu_swiglu.default, (1,), {}) == {"input": 1, "dim": -1}
    for args, kwargs, message in (
        ((), {}, "input is missing"),
        ((1,), {"input": 2}, "input is given twice"),
        ((1,), {"axis": 2}, r"unknown arguments \['axis'\]"),
        ((1, 2, 3), {}, "unknown arguments 3"),
    ):
        with pytest.raises(TypeError, match=message):
            bind(npu.npu_swiglu.default, args, kwargs)


def test_a_symbolic_chain_is_proven() -> None:
    """Sizes that the meta functions derive from a symbolic T satisfy the rows that tie tensors to each other."""
    mode, args, _ = fake_call(2, 512)
    with mode:
        rows, _, assist, counts, received, _, _ = npu.npu_moe_distribute_dispatch_v2(*args)
        gmm = ([rows], [torch.empty(4, 1024, 64, dtype=torch.bfloat16)])
        options = {"group_list": counts, "group_type": 0, "split_item": 2, "group_list_type": 1}
        weights = torch.empty(args[0].shape[0], 2)
        routing = npu.npu_moe_init_routing_v2(*args[:2], expert_num=8, expert_tokens_num_flag=True)
        unpermute = (routing[0], routing[1], weights.bfloat16())
    combine = (rows, args[1], assist, received, weights, *args[2:])
    for op, call, kwargs in (
        (npu.npu_grouped_matmul.default, gmm, options),
        (npu.npu_moe_distribute_combine_v2.default, combine, {}),
        (npu.npu_moe_init_routing_v2.default, args[:2], {"expert_num": 8}),
        (npu.npu_moe_token_unpermute.default, unpermute, {}),
    ):
        assert check_call(op, call, kwargs, soc="A3", extra={"buffer_bytes": 2**30}) == []
    with mode:
        short = (rows[1:], *combine[1:])
    found = check_call(npu.npu_moe_distribute_combine_v2.default, short, {}, soc="A3")
    assert [v.code for v in found] == ["mc2.rows"]


# --------------------------------------------------------------------------------------------------- fused operators

FFN, DECODE, MEGA = (
    getattr(torch.ops.moe_lowering, name).default
    for name in ("dispatch_ffn_combine", "dispatch_gmm_combine_decode", "mega_moe")
)
KNOWN = {
    "buffer_bytes": 2**30, "weight_format": "nz", "has_vllm_ascend": True, "has_cann_ops_transformer": True,
    "equal_tokens": True, "received": 128,
}  # fmt: skip
VERSIONS = {"vllm_ascend": "0.20.2", "cann": "9.2.0"}  # mega_moe takes an intermediate size of 512 from 9.2


def fused_call(op: Any, quantisation: str, **changes: Any) -> dict[str, Any]:
    """A call that every rule for A3 accepts, but for the changes."""
    experts, hidden, inner, tokens = 4, 1024, 512, 16
    packed, dtype = {"w8a8": (1, torch.int8), "w4a8": (8, torch.int32), "none": (1, torch.bfloat16)}[quantisation]
    given: dict[str, Any] = {
        "w13": torch.empty(experts, hidden, 2 * inner // packed, dtype=dtype, device="meta"),
        "w2": torch.empty(experts, inner, hidden // packed, dtype=dtype, device="meta"),
    }
    for kind, formats in (("_scale", ("w8a8", "w4a8")), ("_scale_bias", ("w4a8",))):
        if quantisation in formats:
            given.update({"w13" + kind: torch.empty(experts, 2 * inner), "w2" + kind: torch.empty(experts, hidden)})
    call: dict[str, Any] = {name: list(tensor.clone()) if op is MEGA else [tensor] for name, tensor in given.items()}
    call.update(
        x=torch.empty(tokens, hidden, dtype=torch.bfloat16), ids=torch.empty(tokens, 4, dtype=torch.int32),
        weights=torch.empty(tokens, 4), group="g", ep_size=2,
    )  # fmt: skip
    if op is FFN:
        call.update(max_output_size=128 * counts_of_a_row(quantisation), quantisation=quantisation)
    elif op is DECODE:
        call.update(ep_rank=0, num_experts=8)
    else:
        call.update(num_experts=8, max_tokens=16, max_rows=0, quantisation=quantisation)
    return {**call, **changes}


def fused_codes(op: Any, call: dict[str, Any], **known: Any) -> list[str]:
    return [v.code for v in check_call(op, (), call, soc="A3", extra={**KNOWN, **known}, versions=VERSIONS)]


FORMATS = [(op, quantisation) for op in (FFN, DECODE, MEGA) for quantisation in ("none", "w8a8", "w4a8")]


@pytest.mark.parametrize(("op", "quantisation"), [case for case in FORMATS if case != (DECODE, "w4a8")])
def test_calls_of_fused_operators(op: Any, quantisation: str) -> None:
    known = {"weight_format": "nd"} if op is MEGA and quantisation == "none" else {}
    mask = {"mask": torch.ones(16, dtype=torch.bool)} if op is not FFN or quantisation != "none" else {}
    assert fused_codes(op, fused_call(op, quantisation, **mask), **known) == []


HALF_SCALES = {"w13_scale": [torch.empty(4, 1024).half()], "w2_scale": [torch.empty(4, 1024).half()]}
WINDOW = {"buffer_bytes": 2**34}
WIDE = {"w13_scale": [torch.empty(4, 1024).long()]}


@pytest.mark.parametrize(
    ("op", "quantisation", "changes", "known", "code"),
    [
        (FFN, "w8a8", {"x": torch.empty(513, 1024).bfloat16(), "ids": torch.empty(513, 4).int()}, {}, "fused.tokens"),
        (FFN, "w8a8", {"max_output_size": 2**22}, {}, "fused.workspace"),
        (FFN, "w8a8", {"max_output_size": 40 * (49152 - 12 * 512) + 1}, {}, "fused.epilogue"),
        (FFN, "w4a8", {"max_output_size": 255}, {}, "fused.max_output_size"),
        (FFN, "w8a8", HALF_SCALES, {}, "fused.scales_dtype"),
        (FFN, "w8a8", {"w13_scale": None, "w2_scale": None}, {}, "fused.scales"),
        (FFN, "w8a8", {"w2_scale": [torch.empty(4, 1023)]}, {}, "fused.scales_w2"),
        (FFN, "w8a8", {"w13_scale": [torch.empty(4, 512)]}, {}, "fused.scales_w13"),
        (FFN, "w8a8", {"mask": torch.ones(15, dtype=torch.bool)}, {}, "fused.mask_tokens"),
        (FFN, "w8a8", {"mask": torch.ones(16)}, {}, "fused.mask_dtype"),
        (FFN, "w8a8", {"max_output_size": 127}, {}, "fused.max_output_size"),
        (FFN, "w8a8", {}, {"weight_format": "nd"}, "fused.weight_format"),
        (FFN, "w8a8", {}, {"buffer_bytes": 2**20}, "fused.buffer"),
        (FFN, "w4a8", {"w2_scale_bias": None}, {}, "fused.compensation"),
        (FFN, "w4a8", {"w13_scale_bias": [torch.empty(4, 1024).half()]}, {}, "fused.compensation_dtype"),
        (FFN, "none", {"mask": torch.ones(16, dtype=torch.bool)}, {}, "fused.mask"),
        (FFN, "none", {"swiglu_limit": 1.0}, {}, "fused.activation"),
        (DECODE, "w8a8", WIDE, {}, "fused_decode.scale_dtype"),
        (DECODE, "w8a8", {"w2_scale": None}, {}, "fused_decode.scales"),
        (DECODE, "w8a8", {"global_bs": 15}, {}, "fused_decode.global_bs"),
        (DECODE, "w8a8", {"global_bs": 2 * 4096}, {"buffer_bytes": 2**26}, "fused_decode.buffer"),
        (DECODE, "w8a8", {"num_experts": 514}, {}, "fused_decode.experts"),
        (DECODE, "w8a8", {"weights": torch.empty(16, 4).bfloat16()}, {}, "fused_decode.weights_dtype"),
        (MEGA, "w8a8", {"max_tokens": 4097}, {"buffer_bytes": 2**34}, "mega_moe.max_tokens"),
        (MEGA, "w8a8", {"x": torch.empty(4097, 1024).bfloat16(), "max_tokens": 4097}, WINDOW, "mega_moe.tokens"),
        (MEGA, "w8a8", {"x": torch.empty(0, 1024).bfloat16()}, {}, "mega_moe.tokens"),
        (MEGA, "w8a8", {"max_tokens": 4096}, {"buffer_bytes": 2**27}, "mega_moe.buffer"),
        (MEGA, "w8a8", {}, {"equal_tokens": False}, "mega_moe.equal_tokens"),
        (MEGA, "w8a8", {"activation_clamp": 1.0}, {}, "mega_moe.activation"),
        (MEGA, "w8a8", {"max_rows": 127}, {"received": 128}, "mega_moe.max_output_size"),
        (MEGA, "w4a8", {"w13_scale_bias": None}, {}, "mega_moe.compensation"),
        (MEGA, "w8a8", {"ep_size": 3, "num_experts": 12}, {}, "mega_moe.ep_size"),
    ],
)
def test_broken_calls_of_fused_operators(
    op: Any, quantisation: str, changes: dict[str, Any], known: dict[str, Any], code: str
) -> None:
    assert code in fused_codes(op, fused_call(op, quantisation, **changes), **known)


@pytest.mark.parametrize("name", ["w13", "w2"])
@pytest.mark.parametrize(("op", "quantisation"), [case for case in FORMATS if case != (DECODE, "w4a8")])
def test_fused_operators_take_no_transposed_weights(op: Any, quantisation: str, name: str) -> None:
    """The same shapes, as views of [E, N, K]; FORMATS above are the twins."""
    known = {"weight_format": "nd"} if op is MEGA and quantisation == "none" else {}
    call = fused_call(op, quantisation)
    call[name] = [w.transpose(-1, -2).contiguous().transpose(-1, -2) for w in call[name]]
    prefix = {FFN: "fused", DECODE: "fused_decode", MEGA: "mega_moe"}[op]
    assert fused_codes(op, call, **known) == [f"{prefix}.weight_layout"]


@pytest.mark.parametrize("soc", ["A2", "A3", "A5"])
def test_the_fused_activation_takes_no_transposed_weights(soc: str) -> None:
    """A5 reads them; version 1 does not exist there."""
    x, w, counts = (
        torch.empty(*size, dtype=dtype)
        for size, dtype in (((5, 64), torch.int8), ((2, 64, 128), torch.int8), ((2,), torch.int64))
    )
    view = w.transpose(1, 2).contiguous().transpose(1, 2)
    scale, x_scale = torch.empty(2, 128), torch.empty(5)
    known = {"weight_format": "nd" if soc == "A5" else "nz"}
    for weight, expected in ((w, []), (view, [] if soc == "A5" else ["gmm_swiglu_quant.weight_layout"])):
        second = npu.npu_grouped_matmul_swiglu_quant_v2.default
        calls = [(second, (x, [weight], [scale], x_scale, counts), {"group_list_type": 1, "quant_dtype": 1})]
        if soc != "A5":
            calls.append((npu.npu_grouped_matmul_swiglu_quant.default, (x, weight, counts, scale, x_scale), {}))
        for op, args, options in calls:
            found = check_call(op, args, options, soc=soc, extra=known, versions=VERSIONS)
            assert [v.code for v in found] == expected, op


def test_a_list_of_matrices_is_asked_of_mega_moe() -> None:
    call = fused_call(MEGA, "w8a8")
    stacked = {name: [torch.stack(call[name])] for name in ("w13", "w2")}
    assert fused_codes(MEGA, {**call, **stacked}) == ["mega_moe.weight_list"]


def test_scales_in_float32_are_widened_by_the_wrapper() -> None:
    """The rule is about what the operator receives, and a mixture is widened too."""
    for op in (FFN, MEGA):
        call = fused_call(op, "w8a8")
        wide = {"w2_scale": [scale.long() for scale in call["w2_scale"]]}
        assert fused_codes(op, {**call, **wide}) == []
