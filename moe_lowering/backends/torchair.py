"""A ``torchair.CompilerConfig`` for GE mode ("max-autotune") whose pre-pass is the lowering.

    config = moe_lowering.torchair_config(deployment)
    torch.compile(model, backend=torchair.get_npu_backend(compiler_config=config), fullgraph=True)

The hook is the same as npugraph_ex's, and so is the pass object, with ``Deployment.mode`` "ge": then it emits only
operators that torchair has a converter for. What GE needs beyond that is in ``ge_rewrites``; converters of this package's
own operators are in ``ge_converters``. Source: wheel.torchair_fx_compiler: _optimize_fx.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from moe_lowering import _versions
from moe_lowering.agreement import agreement_before_first
from moe_lowering.argument_checks import require_instance
from moe_lowering.backends import ge_agreement, ge_converters, ge_missing, ge_rewrites
from moe_lowering.backends.cache_key import flat_hook
from moe_lowering.backends.npugraph_ex import check_common
from moe_lowering.deployment import Deployment
from moe_lowering.passes.graph.edit_log import ModuleEdits
from moe_lowering.passes.pipeline import MoeLowering
from moe_lowering.report.records import LoweringReport

GE = "max-autotune"


def torchair_config(
    deployment: Deployment,
    *,
    comm: str = "auto",
    strict: bool = False,
    policy: str = "auto",
    lowering: MoeLowering | None = None,
    agreement_timeout: float | str | None = "auto",
    config: Any = None,
) -> Any:
    """A ``torchair.CompilerConfig`` that makes GE mode lower MoE blocks.

    Args:
        deployment: what the pass may assume; its ``mode`` is taken as "ge".
        comm: ``auto`` or the name of the only implementation to use.
        strict: raise when a block is left unlowered. Without it such a graph fails too, as GE has no converter for the
            generic operators, but with all that GE cannot convert in one message.
        policy: how ``auto`` chooses, see ``MoeLowering``.
        lowering: a pass object of yours, to read its ``reports`` afterwards; its deployment has mode "ge".
        agreement_timeout: compare the ranks of the EP group before the first graph is lowered, see ``npugraph_ex_options``.
        config: a ``CompilerConfig`` of yours, which is changed and returned. A ``post_grad_custom_pre_pass`` in it runs
            first, then the lowering.

    Raises:
        ImportError: torchair is not there; it comes with torch_npu, and needs protobuf. Or torch_npu collides with this torch.
        ValueError: an argument that is not accepted; ``deployment.capture`` is False; ``config.mode`` is another one than
            "max-autotune"; ``lowering`` is given together with ``comm``, ``strict`` or ``policy``, or was made for another
            deployment.
    """
    check_common("torchair_config", deployment, lowering, agreement_timeout)
    if collision := _versions.cuda_collision():
        raise ImportError(f"torchair_config: {collision}")
    import torch_npu  # noqa: F401  # it brings torchair
    import torchair

    kinds = (torchair.CompilerConfig, type(None))
    require_instance("torchair_config", "config", config, kinds, "a torchair.CompilerConfig, or None")

    _after_npugraph_ex()
    ge_converters.register()
    ge_agreement.register()
    deployment = deployment.replace(mode="ge")
    if not deployment.capture:
        raise ValueError(
            "torchair_config: deployment.capture is False, which allows sizes that the host reads, and a GE graph has no "
            "host; accepted: capture=True"
        )
    if lowering is None:
        lowering = MoeLowering(deployment, comm, strict, policy)
    elif (comm, strict, policy) != ("auto", False, "auto") or lowering.deployment != deployment:
        raise ValueError(
            "torchair_config: give either lowering, or comm, strict and policy; its deployment must be the one given, "
            f"with mode 'ge' (it has {lowering.deployment.mode!r})"
        )
    config = torchair.CompilerConfig() if config is None else config
    if config.mode.value != GE:
        raise ValueError(
            f"torchair_config: config.mode is {config.mode.value!r}; accepted: {GE!r}, which is GE mode "
            "(for npugraph_ex: npugraph_ex_options)"
        )
    agree = agreement_before_first(deployment, lowering, agreement_timeout)
    own = config.post_grad_custom_pre_pass.value
    config.post_grad_custom_pre_pass = flat_hook(
        lowering, own, agree, lambda gm, *_: _finish(gm, lowering), agreement_timeout
    )
    return config


def _after_npugraph_ex() -> None:
    """Let torchair compile in a process that loaded npugraph_ex before, as npugraph_ex can after torchair.

    Both register the same things with torch, and only npugraph_ex looks whether they are there. In torch_npu 2.13.0:

    - ``npu_define::broadcast``: torchair's module then lacks the name ``op_broadcast``, which its hcom_allgather.py imports
      (and does not use). torchair/_ge_concrete_graph/ge_converter/experimental, npugraph_ex/ops/_hcom_broadcast.py
    - kernels of ``aten.to.other`` and others for the NPU, which torch refuses to register twice.
      _utils/__init__.py of both, add_npu_patch and register_matmul_backward_decomp
    """
    from torchair import _utils
    from torchair._ge_concrete_graph.ge_converter.experimental import hcom_broadcast

    if not hasattr(hcom_broadcast, "op_broadcast"):
        hcom_broadcast.op_broadcast = "npu_define::broadcast"
    if torch._C.DispatchKey.AutogradPrivateUse1 in torch.ops.aten.to.other.py_kernels:
        _utils.register_matmul_backward_decomp = lambda: None


def _finish(gm: GraphModule, lowering: MoeLowering) -> None:
    """What GE needs after the lowering; on an error the graph is as the lowering left it."""
    edits = ModuleEdits(gm)
    try:
        ge_rewrites.finish(edits)
        ge_agreement.place_agreement_checks(edits)
        edits.compile()
    except BaseException:
        edits.undo()
        raise
    ge_missing.require_converters(gm.graph, _reasons_left(lowering.reports[-1]))


def _reasons_left(report: LoweringReport) -> list[str]:
    left = [f"{block.name} was left: {block.reason}" for block in report.blocks if block.comm is None]
    return left + [f"{where} was not recognised: {why}" for where, why in report.unlowered]
