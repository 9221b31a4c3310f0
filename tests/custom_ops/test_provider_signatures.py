"""The device kernel of ``mega_moe`` against every published signature of the Python function that it calls."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fused_layers import HIDDEN, make_layer
from provider_calls import EXPERTS, MASK, PUBLISHED, bits, call_of, equal_lists, expect_result, on_npu
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_lowering.custom_ops import mega_moe

pytestmark = pytest.mark.xdist_group("look_alikes")  # one process: one look-alike of a name at a time


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
