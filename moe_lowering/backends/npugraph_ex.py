"""Options for ``torch.compile(model, backend="npugraph_ex", options=...)``.

The pass runs as npugraph_ex's ``post_grad_custom_pre_pass``: after AOTAutograd, before npugraph_ex's own patterns, so
stock fusions still apply to what it emits. Source: wheel.fx_compiler: _optimize_fx.

``inplace_pass`` is off unless asked for. npugraph_ex of torch_npu 2.13.0 compares element counts there, not shapes or
overlap: ``a[:, 1:] - a[:, :-1]`` becomes ``sub_`` on overlapping slices (transformers finds packed sequences that way, and
attention is wrong from the ninth token on), and a graph for one token fails; with or without this pass. vllm-ascend turns
it off too.
Sources: wheel.reinplace, here.test_npugraph_ex: tried; vllm_ascend.compiler: inplace_pass=False.
"""

from __future__ import annotations

from typing import Any

from moe_lowering.agreement import agreement_before_first
from moe_lowering.argument_checks import require_callable, require_instance, require_seconds
from moe_lowering.backends.cache_key import flat_hook
from moe_lowering.deployment import Deployment
from moe_lowering.passes.pipeline import MoeLowering

PRE_PASS = "post_grad_custom_pre_pass"


def npugraph_ex_options(
    deployment: Deployment,
    *,
    comm: str = "auto",
    strict: bool = False,
    policy: str = "auto",
    overlap: bool = False,
    lowering: MoeLowering | None = None,
    agreement_timeout: float | str | None = "auto",
    **options: Any,
) -> dict[str, Any]:
    """Options that make npugraph_ex lower MoE blocks.

    Args:
        deployment: what the pass may assume.
        comm: ``auto`` or the name of the only implementation to use.
        strict: raise when a block is left unlowered.
        policy: how ``auto`` chooses, see ``MoeLowering``.
        overlap: shared experts on a side stream, beside dispatch and combine, see ``MoeLowering``.
        lowering: a pass object of yours, to read its ``reports`` afterwards; made from the arguments above when None.
        agreement_timeout: ranks of one EP group with different deployments, settings or code are told so before the first
            graph is lowered, and ranks whose blocks differ before the first exchange of a graph (docs/ranks.md); seconds to
            wait for the slowest rank. ``auto``: as long as the group's collectives would wait, where there is such a
            group. None for no check, on every rank alike: who does not compare has not answered.
        options: further npugraph_ex options, kept as they are; ``inplace_pass`` is False when it is not given.
            A ``post_grad_custom_pre_pass`` of yours runs first, then the lowering: it sees, and verifies, the last
            word on MoE blocks. The hook is a function whose code holds a digest of deployment, limits and pass, so that
            ``cache_compile`` never loads a graph that was lowered for other ones.

    Raises:
        ValueError: an argument that is not accepted, or an option that npugraph_ex does not have; ``deployment.mode`` is
            "ge"; ``deployment.capture`` is False without ``force_eager``; ``lowering`` is given together with ``comm``,
            ``strict``, ``policy`` or ``overlap``, or was made for another deployment.
    """
    where = "npugraph_ex_options"
    check_common(where, deployment, lowering, agreement_timeout)
    deployment = deployment.placed()
    if lowering is None:
        lowering = MoeLowering(deployment, comm, strict, policy, overlap=overlap)
    elif (comm, strict, policy, overlap) != ("auto", False, "auto", False) or lowering.deployment != deployment:
        raise ValueError(
            "npugraph_ex_options: give either lowering, or comm, strict, policy and overlap; its deployment must be the "
            "one given"
        )
    if not deployment.capture and not options.get("force_eager", False):
        raise ValueError(
            "npugraph_ex_options: deployment.capture is False, and npugraph_ex captures the graph; accepted: with "
            "force_eager=True, or capture=True"
        )
    if deployment.mode != "npugraph_ex":
        raise ValueError(
            f"npugraph_ex_options: deployment.mode is {deployment.mode!r}; accepted: 'npugraph_ex' (for GE mode: "
            "torchair_config)"
        )
    own = options.pop(PRE_PASS, None)
    if own is not None:
        require_callable(where, PRE_PASS, own, "a callable (gm, example_inputs, config)")
    check_options(where, options)
    agree = agreement_before_first(deployment, lowering, agreement_timeout)
    return {"inplace_pass": False, **options, PRE_PASS: flat_hook(lowering, own, agree, None, agreement_timeout)}


def check_common(where: str, deployment: Any, lowering: Any, agreement_timeout: Any) -> None:
    """What the options of both backends have in common."""
    require_instance(where, "deployment", deployment, Deployment, "a moe_lowering.Deployment")
    require_instance(where, "lowering", lowering, (MoeLowering, type(None)), "a moe_lowering.MoeLowering, or None")
    require_seconds(where, "agreement_timeout", agreement_timeout, "auto", None)


def check_options(what: str, options: dict[str, Any]) -> None:
    """Refuse what npugraph_ex's own configuration refuses, before anything is compiled; nothing where it is not loaded.

    Raises:
        ValueError: an option that it does not have, or a value that it does not take; ``what`` begins the message.
    """
    try:
        from npugraph_ex.configs.compiler_config import CompilerConfig
    except ImportError:  # without torch_npu the compile says so
        return
    config = CompilerConfig()
    accepted = [name for name in vars(config) if not name.startswith("_")]
    for name, value in options.items():
        if name not in accepted:
            raise ValueError(f"{what}: unknown option {name!r}; accepted: npugraph_ex's {', '.join(accepted)}")
        try:
            setattr(config, name, value)
        except (TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]  # torch_npu puts its traceback into the message
            raise ValueError(f"{what}: option {name} is {value!r}: {reason}") from None
