"""Kernels of vllm-ascend's own operators for quantised experts, and what its loading and AllToAll call; float64 references."""

import pytest
import torch

from moe_lowering import simulator
from moe_lowering.simulator.kernels import common, vllm_operators

pytestmark = pytest.mark.filterwarnings("ignore")
simulator.enable_device("A3")
npu = torch.ops.npu
COUNTS, LINES, WIDTH = [2, 0, 3], 16, 16  # rows of each expert


def experts(most):
    torch.manual_seed(0)
    whole = torch.randint(-most, most + 1, (len(COUNTS), LINES, WIDTH))
    scale = torch.rand(len(COUNTS), WIDTH) * 0.1 + 0.01
    x, row_scale = torch.randint(-127, 128, (7, LINES)), torch.rand(7) * 0.1 + 0.01
    return x.to(torch.int8), row_scale, whole, scale


def swiglu(x, row_scale, whole, scale):
    """Float64 [rows, WIDTH / 2] of the rows that an expert has."""
    rows = []
    for expert, count in enumerate(COUNTS):
        begin = sum(COUNTS[:expert])
        sums = x[begin : begin + count].double() @ whole[expert].double() * scale[expert].double()
        gate, up = (sums * row_scale[begin : begin + count].double().unsqueeze(1)).chunk(2, -1)
        rows.append(torch.nn.functional.silu(gate) * up)
    return torch.cat(rows)


def check(y, scale, expected):
    used = len(expected)
    values = y[:used].double() * scale[:used].double().unsqueeze(1)
    step = expected.abs().amax(-1, keepdim=True) / 127
    assert (values - expected).abs().le(step * 0.51 + 1e-6).all()
    assert scale[used:].isnan().all() and len(y) > used


def test_int8_experts():
    x, row_scale, whole, scale = experts(127)
    prefix = torch.tensor(COUNTS).cumsum(0)
    call = vllm_operators.KERNELS["grouped_matmul_swiglu_quant_weight_nz"]
    arguments = {"bias": None, "offset": None, "swiglu_limit": 0.0}
    y, row, _ = call(x, whole.to(torch.int8), scale, row_scale, prefix, **arguments)
    check(y, row, swiglu(x, row_scale, whole, scale))
    with pytest.raises(ValueError, match=r"swiglu_limit is 7.0; the CPU kernel computes only: none"):
        call(x, whole.to(torch.int8), scale, row_scale, prefix, **{**arguments, "swiglu_limit": 7.0})


@pytest.mark.parametrize("kind", [0, 1])
def test_int4_experts(kind):
    x, row_scale, whole, scale = experts(7)
    shifted = [(whole[..., i::8].long() & 15) << (4 * i) for i in range(8)]
    packed, bits = sum(shifted).to(torch.int32), scale.view(torch.int32).long()
    assist = 8 * (whole.double() * scale.double().unsqueeze(1)).sum(1).float()
    groups = torch.tensor(COUNTS) if kind else torch.tensor(COUNTS).cumsum(0)
    call = vllm_operators.KERNELS["grouped_matmul_swiglu_quant_v2"]
    plain = {"smooth_scale": None, "bias": None, "dequant_mode": 0, "quant_mode": 0, "transpose_weight": False}
    arguments = {"group_list_type": kind, "swiglu_limit": 0.0, **plain}
    y, row = call(x, [packed], [bits], row_scale, groups, weight_assist_matrix=[assist], **arguments)
    check(y, row, swiglu(x, row_scale, whole, scale))
    other, _ = call(x, [packed], [bits], row_scale, groups, weight_assist_matrix=[assist * 2], **arguments)
    assert not torch.equal(other, y)
    with pytest.raises(ValueError, match=r"weight is 1 torch\.int8"):
        call(x, [whole.to(torch.int8)], [bits], row_scale, groups, weight_assist_matrix=[assist], **arguments)


def test_format_cast_keeps_values_and_refuses_what_a_device_does():
    for dtype in (torch.int8, torch.bfloat16):
        x = torch.arange(24).reshape(2, 3, 4).transpose(1, 2).to(dtype)
        for made in (npu.npu_format_cast(x, 29), npu.npu_format_cast(x.npu(), 29).cpu()):
            assert torch.equal(made, x) and made.is_contiguous()
    with pytest.raises(ValueError, match=r"input is torch.float32 \[2, 2\]; accepted: a matrix"):
        npu.npu_format_cast(torch.ones(2, 2), 29)
    with pytest.raises(ValueError, match="acl_format is 3; the CPU kernel computes only: 2"):
        npu.npu_format_cast(torch.ones(2, 2), 3)


def test_histc_of_integers():
    ids = torch.tensor([[0, 3], [3, 1]], dtype=torch.int32)
    found = torch.histc(ids.npu(), bins=4, min=0, max=4)
    assert found.dtype == torch.int32 and found.tolist() == [1, 1, 0, 2]
    assert torch.histc(ids.float().npu(), bins=4, min=0, max=4).tolist() == [1, 1, 0, 2]


@pytest.mark.parametrize(("word", "value"), [("nan", None), ("finite", 1.0)])
def test_what_undefined_is_filled_with(monkeypatch, word, value):
    monkeypatch.setenv(common.UNDEFINED, word)
    made = common.make_undefined((2, 3), torch.bfloat16)
    assert made.isnan().all() if value is None else (made == value).all()
    assert set(common.make_undefined((2,), torch.int8).tolist()) == {-128 if value is None else 1}


def test_an_unknown_fill(monkeypatch):
    monkeypatch.setenv(common.UNDEFINED, "zero")
    with pytest.raises(ValueError, match="MOE_LOWERING_SIMULATOR_UNDEFINED is 'zero'; accepted: nan, finite"):
        common.make_undefined((1,), torch.int8)
