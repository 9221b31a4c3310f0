"""Options for ``torch.compile(model, backend="npugraph_ex", options=...)``.

The pass runs as npugraph_ex's ``post_grad_custom_pre_pass``: after AOTAutograd, before npugraph_ex's own patterns, so
stock fusions still apply to what it emits. Source: torch_npu 2.13.0, npugraph_ex/npu_fx_compiler.py (_optimize_fx).

``inplace_pass`` is off unless asked for. npugraph_ex of torch_npu 2.13.0 compares element counts there, not shapes or
overlap: ``a[:, 1:] - a[:, :-1]`` becomes ``sub_`` on overlapping slices (transformers finds packed sequences that way, and
attention is wrong from the ninth token on), and a graph for one token fails; with or without this pass. vllm-ascend turns
it off too (facts/versions.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_lowering.deployment import Deployment
from moe_lowering.passes.pipeline import MoeLowering

Hook = Callable[[Any, Any, Any], None]
PRE_PASS = "post_grad_custom_pre_pass"


class _Chain:
    """The user's pre-pass, then the lowering: the pass sees, and verifies, the last word on MoE blocks."""

    def __init__(self, first: Hook, second: Hook) -> None:
        self.first, self.second = first, second

    def __call__(self, gm: Any, example_inputs: Any, config: Any) -> None:
        self.first(gm, example_inputs, config)
        self.second(gm, example_inputs, config)


def npugraph_ex_options(
    deployment: Deployment,
    *,
    comm: str = "auto",
    strict: bool = False,
    policy: str = "auto",
    lowering: MoeLowering | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Options that make npugraph_ex lower MoE blocks.

    Args:
        deployment: what the pass may assume.
        comm: ``auto`` or the name of the only implementation to use.
        strict: raise when a block is left unlowered.
        policy: how ``auto`` chooses, see ``MoeLowering``.
        lowering: a pass object of yours, to read its ``reports`` afterwards; made from the arguments above when None.
        options: further npugraph_ex options, kept as they are; ``inplace_pass`` is False when it is not given.
            A ``post_grad_custom_pre_pass`` of yours runs first,
            then the lowering.

    Raises:
        TypeError: when ``post_grad_custom_pre_pass`` is not callable.
        ValueError: when ``lowering`` is given together with ``comm``, ``strict`` or ``policy``, or was made for another
            deployment.
    """
    if lowering is None:
        lowering = MoeLowering(deployment, comm, strict, policy)
    elif (comm, strict, policy) != ("auto", False, "auto") or lowering.deployment != deployment:
        raise ValueError(
            "npugraph_ex_options: give either lowering, or comm, strict and policy; its deployment must be the one given"
        )
    own = options.pop(PRE_PASS, None)
    if own is not None and not callable(own):
        raise TypeError(
            f"npugraph_ex_options: {PRE_PASS} is {own!r}; accepted: a callable (gm, example_inputs, config)"
        )
    return {"inplace_pass": False, **options, PRE_PASS: _Chain(own, lowering) if own is not None else lowering}
