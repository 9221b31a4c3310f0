"""Optional arguments of the simulator's operators: left out, None, or their default by its value, all mean the same.

op-plugin reads ``int? group_list_type=0`` with ``value_or(0)``: None is prefix sums, not counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_build import build
from graph_cases import BlockCase, GraphCase

from moe_lowering import Deployment, MoeLowering
from moe_lowering.limits import bind, check_call
from moe_lowering.simulator import kernels

npu = torch.ops.npu
X, IDS = torch.randn(4, 8), torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2]], dtype=torch.int32)
INT8, SCALE = torch.randint(-9, 9, (4, 64), dtype=torch.int8), torch.rand(4) + 0.5
W8, W_SCALE = torch.randint(-9, 9, (2, 64, 128), dtype=torch.int8), torch.rand(2, 128) + 0.5
COUNTS, ENDS = torch.tensor([1, 3]), torch.tensor([1, 4])
WEIGHTS, HEADS, LINES = torch.randn(2, 8, 8), torch.randn(4, 2, 8), torch.randn(4, 1, 1, 2)
MC2 = ("group", 2, 0, 8)
# A legal call of every operator that has a kernel: the arguments that it must have.
CALLS: dict[str, dict[str, Any]] = {
    "npu_moe_gating_top_k": {"x": X, "k": 2},
    "npu_moe_gating_top_k_softmax": {"x": X},
    "npu_moe_gating_top_k_softmax_v2": {"x": X},
    "npu_moe_init_routing": {"x": X, "row_idx": torch.arange(8).int().reshape(2, 4).t(), "expert_idx": IDS, "active_num": 4},
    "npu_moe_compute_expert_tokens": {"sorted_expert_for_source_row": torch.arange(3).int(), "num_expert": 4},
    "npu_moe_init_routing_v2": {"x": X, "expert_idx": IDS, "expert_num": 3},
    "npu_moe_token_unpermute": {"permuted_tokens": X, "sorted_indices": torch.arange(4).int()},
    "npu_moe_token_permute": {"tokens": X, "indices": IDS},
    "npu_moe_re_routing": {"tokens": X.half(), "expert_token_num_per_rank": torch.tensor([[1, 1], [1, 1]])},
    "npu_moe_finalize_routing": {
        "expanded_permuted_rows": X, "skip1": None, "skip2": None, "bias": None, "scales": None,
        "expanded_src_to_dst_row": torch.arange(4).int(), "export_for_source_row": None,
    },
    "npu_grouped_matmul": {"x": [X], "weight": [WEIGHTS], "group_list": ENDS, "split_item": 2, "group_type": 0},
    "npu_swiglu": {"input": X},
    "npu_clipped_swiglu": {"x": X},
    "npu_dynamic_quant": {"input": X.half()},
    "npu_grouped_matmul_swiglu_quant": {
        "x": INT8, "weight": W8, "group_list": ENDS, "weight_scale": W_SCALE, "x_scale": SCALE,
    },
    "npu_grouped_matmul_swiglu_quant_v2": {
        "x": INT8, "weight": [W8], "weight_scale": [W_SCALE], "x_scale": SCALE, "group_list": ENDS,
    },
    "npu_dequant_swiglu_quant": {
        "x": torch.randint(-99, 99, (4, 128), dtype=torch.int32), "weight_scale": W_SCALE, "activation_scale": SCALE,
        "group_index": COUNTS, "quant_mode": 1,
    },
    "npu_swiglu_quant": {"x": X.half(), "quant_mode": 1},
    "npu_rms_norm": {"input": X, "gamma": X[0]},
    "npu_add_rms_norm": {"x1": X, "x2": X, "gamma": X[0]},
    "npu_rotary_mul": {"input": X, "r1": X, "r2": X},
    "npu_interleave_rope": {"x": X, "cos": X, "sin": X},
    "npu_apply_rotary_pos_emb": {"query": X, "key": X, "cos": X, "sin": X},
    "npu_kv_rmsnorm_rope_cache": {
        "kv": X.view(4, 1, 1, 8), "gamma": X[0, :6], "cos": LINES, "sin": LINES, "index": torch.arange(4), "cache_mode": "PA",
        "k_cache": torch.zeros(2, 2, 1, 2), "ckv_cache": torch.zeros(2, 2, 1, 6),
    },
    "npu_transpose_batchmatmul": {"input": WEIGHTS, "weight": WEIGHTS},
    "npu_format_cast": {"input": X.half(), "acl_format": 29},
    "npu_fused_infer_attention_score": {
        "query": HEADS, "key": HEADS, "value": HEADS, "num_heads": 2, "input_layout": "TND", "actual_seq_lengths": [4],
        "actual_seq_lengths_kv": [4],
    },
    "npu_fused_infer_attention_score_v2": {
        "query": HEADS, "key": HEADS, "value": HEADS, "num_query_heads": 2, "input_layout": "TND", "actual_seq_qlen": [4],
        "actual_seq_kvlen": [4],
    },
    "npu_moe_distribute_dispatch_v2": {
        "x": X.bfloat16(), "expert_ids": IDS, "group_ep": "g", "ep_world_size": 2, "ep_rank_id": 0, "moe_expert_num": 8,
    },
    "npu_moe_distribute_combine_v2": {
        "expand_x": X.bfloat16(), "expert_ids": IDS, "assist_info_for_combine": IDS, "ep_send_counts": IDS,
        "expert_scales": X, "group_ep": "g", "ep_world_size": 2, "ep_rank_id": 0, "moe_expert_num": 8,
    },
}  # fmt: skip
COLLECTIVE = {*kernels.DISTRIBUTE}
LOCAL = kernels.LOCAL
NO_DEFAULTS = {"npu_swiglu", "npu_moe_init_routing", "npu_moe_compute_expert_tokens", "npu_interleave_rope"}
# What arguments that are None by default mean, where another value says the same.
BY_VALUE = {
    ("npu_dynamic_quant", "dst_type"): 1,
    ("npu_dequant_swiglu_quant", "dst_type"): 1,
    ("npu_dequant_swiglu_quant", "round_mode"): 0,
    ("npu_dequant_swiglu_quant", "activate_dim"): -1,
    ("npu_swiglu_quant", "dst_type"): torch.int8,
    ("npu_moe_init_routing_v2", "x_dtype"): 6,
    ("npu_moe_re_routing", "tokens_dtype"): 5,
    ("npu_moe_token_permute", "num_out_tokens"): 0,
    ("npu_grouped_matmul", "output_dtype"): 6,
}


def call_of(name: str) -> Any:
    return getattr(npu, name).default


def arguments(name: str) -> list[Any]:
    return [a for a in call_of(name)._schema.arguments if a.has_default_value() and a.name not in CALLS[name]]


def meanings(name: str) -> list[tuple[str, Any]]:
    """(argument, value that means its default)."""
    found = []
    for a in arguments(name):
        values = [a.default_value]
        if str(a.type).startswith("Optional"):
            values.append(None)
        if (name, a.name) in BY_VALUE:
            values.append(BY_VALUE[name, a.name])
        found += [(a.name, value) for value in values]
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    return all(same(x, y) for x, y in zip(a, b, strict=True))


def test_every_operator_with_a_kernel_is_called() -> None:
    assert CALLS.keys() == LOCAL.keys() | COLLECTIVE


@pytest.mark.parametrize("name", CALLS)
def test_a_default_by_its_value(name: str) -> None:
    plain = bind(call_of(name), (), CALLS[name]) if name in COLLECTIVE else call_of(name)(**CALLS[name])
    tried = meanings(name)
    assert tried or name in NO_DEFAULTS
    for argument, value in tried:
        given = {**CALLS[name], argument: value}
        if name in COLLECTIVE:  # kernels see nothing but this
            bound = bind(call_of(name), (), given)
            assert all(bound[key] is value or bound[key] == value for key, value in plain.items()), argument
        else:
            assert same(call_of(name)(**given), plain), (argument, value)


def test_the_group_list_of_a_grouped_matmul() -> None:
    """None and 0 are prefix sums; counts are another thing."""
    rows, weights = torch.randn(10, 16), torch.randn(3, 16, 8)
    expected = torch.cat([rows[:4] @ weights[0], rows[4:7] @ weights[1], rows[7:] @ weights[2]])
    call: Callable[..., Any] = npu.npu_grouped_matmul
    for kind, groups in (({}, [4, 7, 10]), ({"group_list_type": None}, [4, 7, 10]), ({"group_list_type": 0}, [4, 7, 10]),
                         ({"group_list_type": 1}, [4, 3, 3])):  # fmt: skip
        for split in (2, 3):
            (y,) = call([rows], [weights], group_list=torch.tensor(groups), split_item=split, group_type=0, **kind)
            torch.testing.assert_close(y, expected)
    with pytest.raises(ValueError, match="prefix sums that never decrease"):
        call([rows], [weights], group_list=torch.tensor([4, 3, 3]), split_item=2, group_type=0, group_list_type=None)


# --- calls of vllm-ascend that the simulator refused --------------------------------------------------------------------


def test_unpermute_takes_a_shape_that_it_does_not_need() -> None:
    """vllm-ascend 0.23.0, token_dispatcher.py: restore_shape without padded_mode."""
    rows, index, probs = torch.randn(6, 8), torch.arange(6).int(), torch.rand(3, 2)
    expected = npu.npu_moe_token_unpermute(rows, index, probs)
    assert torch.equal(npu.npu_moe_token_unpermute(rows, index, probs, restore_shape=[3, 8]), expected)
    with pytest.raises(ValueError, match=r"unpermute\.padded_mode"):
        npu.npu_moe_token_unpermute(rows, index, probs, padded_mode=True, restore_shape=[3, 8])


def test_int8_rows_are_permuted_on_a3() -> None:
    """vllm-ascend 0.23.0, token_dispatcher.py: W8A8 with AllToAll."""
    rows, places = npu.npu_moe_token_permute(INT8, torch.tensor([1, 0, 1, 0]).int())
    assert torch.equal(rows, INT8[[1, 3, 0, 2]]) and places.tolist() == [2, 0, 3, 1]
    found = check_call(npu.npu_moe_token_permute.default, (INT8, torch.arange(4).int()), {}, soc="A2")
    assert [v.code for v in found] == ["permute.x_dtype"]


def test_init_routing_is_told_the_dtype_that_x_has() -> None:
    """vllm-ascend main aa48bd6879: x_dtype=torch.int8 for int8 rows."""
    named = {"scale": SCALE, "expert_num": 8, "expert_tokens_num_flag": True, "active_expert_range": [0, 8]}
    ids = torch.arange(4).int().unsqueeze(-1)
    plain = npu.npu_moe_init_routing_v2(INT8, ids, **named)
    assert same(npu.npu_moe_init_routing_v2(INT8, ids, **named, x_dtype=1), plain)
    with pytest.raises(ValueError, match="x_dtype is 5; the CPU kernel computes only: None or 1"):
        npu.npu_moe_init_routing_v2(INT8, ids, **named, x_dtype=5)


def test_init_routing_of_no_tokens() -> None:
    """op-plugin, test_npu_moe_init_routing_empty_tensor: a scale of one axis where one row of it would be two."""
    named = {"expert_num": 32, "quant_mode": 1, "active_expert_range": [0, 16], "expert_tokens_num_flag": True}
    for tokens, fine in ((0, True), (2, False)):
        x, ids = torch.empty(tokens, 64).bfloat16(), torch.zeros(tokens, 4, dtype=torch.int32)
        call = lambda: npu.npu_moe_init_routing_v2(  # noqa: E731
            x, ids, scale=torch.empty(tokens), expert_tokens_num_type=1, **named  # noqa: B023
        )  # fmt: skip
        if fine:
            rows, _, counts, scale = call()
            assert rows.shape == (0, 64) and rows.dtype == torch.int8 and counts.tolist() == [0] * 16 and not len(scale)
        else:
            with pytest.raises(ValueError, match=r"routing\.scale_dims"):
                call()


@pytest.mark.parametrize("soc", ["A3", "A5"])
def test_mc2_takes_the_ep_group_as_tp_group(soc: str) -> None:
    """vllm-ascend passes it in every call on A3 and A5; newest op-plugin documentation: the value has no effect."""
    given = {"group_tp": "g", "tp_world_size": 1 if soc == "A3" else 0}
    x = torch.randn(4, 1024).bfloat16()
    args = (x, torch.zeros(4, 2, dtype=torch.int32), "g", 2, 0, 8)
    extra, versions = {"buffer_bytes": 2**30}, {"cann": "9.1.0"}
    assert (
        check_call(npu.npu_moe_distribute_dispatch_v2.default, args, given, soc=soc, extra=extra, versions=versions)
        == []
    )


# --- rules that cannot concern a case are not printed -------------------------------------------------------------------

JOINT = {"ep_size": 4, "ep_group": "ep", "mc2_group": "mc2", "hccl_buffer_mb": 4096, "weight_format": "nz"}
VLLM_ASCEND = (("vllm_ascend", "0.23.0"),)


def codes(quantisation: str = "none", dtype: torch.dtype = torch.bfloat16, **fields: Any) -> dict[str, set[str]]:
    deployment = Deployment(**fields)
    block = BlockCase(8 * deployment.ep_size, 2, 512, quantisation=quantisation)
    lowering = MoeLowering(deployment)
    lowering(build(GraphCase(deployment, (block,), hidden=1024, dtype=dtype, symbolic=(False,))).gm)
    (report,) = lowering.reports[-1].blocks
    return {comm: {v.code for v in verdict.violations} for comm, verdict in report.verdicts.items()}


@pytest.mark.parametrize("providers", [(), VLLM_ASCEND, (("cann_ops_transformer", "9.2.0"),)])
@pytest.mark.parametrize("quantisation", ["none", "w8a8"])
def test_one_rank_has_one_reason(providers: tuple[Any, ...], quantisation: str) -> None:
    """No advice to install a provider, to make a second process group or to cast weights, none of which would help."""
    found = codes(quantisation, providers=providers)
    assert found == {
        "allgather": set(),
        "alltoall": {"alltoall.ep_size"},
        "mc2": {"mc2.ep_size"},
        "fused_mc2": {"fused.ep_size"},
    }
    assert codes(quantisation, **{**JOINT, "mc2_group": ""}, providers=providers)["mc2"] == {"mc2.communicator"}


@pytest.mark.parametrize("quantisation", ["none", "w8a8"])
def test_a_soc_without_the_implementation_is_the_only_reason(quantisation: str) -> None:
    found = codes(quantisation, **JOINT, soc="310P")
    assert [found[comm] for comm in ("allgather", "alltoall", "mc2")] == [
        {"allgather.soc"},
        {"alltoall.soc"},
        {"mc2.soc"},
    ]


@pytest.mark.parametrize("mode", [1, 2])
def test_w4a16_is_not_told_of_w4a8(mode: int) -> None:
    found = codes("w4a16", **JOINT, providers=VLLM_ASCEND, fused_mode=mode)
    assert found["fused_mc2"] == {"fused.quantisation"}
    assert codes("w4a8", **JOINT, providers=VLLM_ASCEND, fused_mode=2)["fused_mc2"] == {"fused_decode.weight_dtype"}
