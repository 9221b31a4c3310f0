"""npu_fused_infer_attention_score.out and its second version on device "npu": attention into the caller's tensors.

The schema does not say that ``out`` is written, and there is no meta kernel, so the general kernel of the device cannot
serve it: results go to the addresses of ``out``, now or at each replay, and ``out`` is what is returned. Also here: the
operators that ask for the size of a workspace.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_lowering.simulator.device import capture_state
from moe_lowering.simulator.device.kernels import Kernel
from moe_lowering.simulator.device.memory import tree_to_host
from moe_lowering.simulator.kernels import infer_attention


def into_out(name: str) -> Kernel:
    """The npu kernel of ``<name>.out``."""

    def call(
        *args: Any, out: list[torch.Tensor], workspace: Any = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        op = getattr(torch.ops.npu, name).default
        host_args, host_kwargs, (y, logarithms) = tree_to_host(args), tree_to_host(kwargs), tree_to_host(list(out))

        def compute() -> None:
            values = op(*host_args, **host_kwargs)
            y.copy_(values[0].reshape(y.shape))
            if logarithms.shape == values[1].shape:  # a single number stands for none
                logarithms.copy_(values[1])

        if capture_state.tape_in_progress(f"npu::{name}") is None:
            compute()
        else:
            capture_state.record(f"npu::{name}", compute)
        return out[0], out[1]

    return call


def max_workspace(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """How much memory a device wants beside its operands, as a tensor of that many bytes: one byte here. It is asked on the host,
    in a capture too, and is not part of the graph."""
    return torch.empty(1, dtype=torch.uint8, device=query.device)


KERNELS: dict[str, Kernel] = {f"{name}.out": into_out(name) for name in infer_attention.KERNELS} | {
    f"_{name}_get_max_workspace": max_workspace for name in infer_attention.KERNELS
}
