"""CPU kernel of npu_format_cast. Meaning: torch_npu 2.13.0's documentation: the same values, stored in another memory format.

A tensor of the simulator has no memory format of its own. What a device would not cast is refused all the same.
"""

from __future__ import annotations

import torch

from moe_lowering.simulator.kernels.common import Kernel, refuse, refuse_unsimulated

FORMAT_CAST = "npu_format_cast"
ND, FRACTAL_NZ = 2, 29
NZ_DTYPES = (torch.int8, torch.int32, torch.float16, torch.bfloat16)


def format_cast(
    input: torch.Tensor, acl_format: int, customize_dtype: int | None, input_dtype: int | None
) -> torch.Tensor:
    """x of any shape -> a tensor of the same shape, dtype and values. acl_format: 2 (ND) or 29 (FRACTAL_NZ)."""
    if acl_format not in (ND, FRACTAL_NZ):
        refuse_unsimulated(FORMAT_CAST, "acl_format", acl_format, f"{ND} (ND), {FRACTAL_NZ} (FRACTAL_NZ)")
    if customize_dtype is not None or input_dtype is not None:
        refuse_unsimulated(FORMAT_CAST, "customize_dtype, input_dtype", (customize_dtype, input_dtype), "None")
    if acl_format == FRACTAL_NZ and (input.dim() < 2 or input.dtype not in NZ_DTYPES):
        accepted = "a matrix or more axes, int8, int32, float16 or bfloat16, to cast to FRACTAL_NZ"
        refuse(FORMAT_CAST, "input", f"{input.dtype} {list(input.shape)}", accepted)
    return input.clone(memory_format=torch.contiguous_format)


KERNELS: dict[str, Kernel] = {FORMAT_CAST: format_cast}
