"""The CPU kernel of custom::npu_swiglu_clip_quant against its definition in float64, what it leaves undefined, and refusals."""

from typing import Any

import pytest
import torch
from kernel_calls import like_meta

from moe_lowering import simulator

simulator.enable("A3")
custom = torch.ops.custom
ALPHA = torch.tensor([0.25, 0.75, 1.5])
COUNTS = torch.tensor([3, 0, 4])
EXPERTS = [0, 0, 0, 2, 2, 2, 2]


@pytest.mark.parametrize("left", [True, False])
def test_is_its_definition(left: bool) -> None:
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[1] = 0
    values, scale = like_meta(custom.npu_swiglu_clip_quant, x, COUNTS, ALPHA, activate_left=left)
    first, second = x.double().chunk(2, 1)
    gate, up = (first, second) if left else (second, first)
    exact = gate / (1 + torch.exp(-gate)) * up
    most = exact.abs().amax(1)[:7] * ALPHA[EXPERTS].double()
    torch.testing.assert_close(scale[:7].double(), most / 127, rtol=1e-6, atol=0)
    steps = exact[:7] / torch.where(most == 0, 1.0, most / 127).unsqueeze(1)
    assert (values[:7].double() - steps.clamp(-127, 127)).abs().max() <= 0.5001
    assert (steps.abs() > 127.5).any() and values[3:7].abs().max() == round(127 / 1.5)
    assert (values[7:] == -128).all() and scale[7:].isnan().all()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"x": torch.ones(7, 128)}, "swiglu_clip_quant.x_dtype"),
        ({"x": torch.ones(7, 96).bfloat16()}, "swiglu_clip_quant.width_multiple"),
        ({"x": torch.ones(7, 10560).bfloat16()}, "swiglu_clip_quant.width"),
        ({"group_index": COUNTS.int()}, "swiglu_clip_quant.group_list_dtype"),
        ({"group_index": COUNTS.unsqueeze(0)}, "swiglu_clip_quant.group_list_dims"),
        ({"group_index": COUNTS + 1}, "at most the 7 rows"),
        ({"group_alpha": ALPHA.half()}, "swiglu_clip_quant.clip_dtype"),
        ({"group_alpha": ALPHA[:2]}, "swiglu_clip_quant.clips"),
        ({"quant_mode": 0}, "swiglu_clip_quant.quant_mode"),
        ({"clamp_mode": 0}, "swiglu_clip_quant.clamp_mode"),
    ],
)
def test_refuses(changes: dict[str, Any], code: str) -> None:
    given = {"x": torch.ones(7, 128).bfloat16(), "group_index": COUNTS, "group_alpha": ALPHA, **changes}
    with pytest.raises(ValueError, match=code):
        custom.npu_swiglu_clip_quant(**given)
