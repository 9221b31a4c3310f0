"""Everything that the rules of a call read: the quantities of its arguments, and those that no argument shows.

The latter (``limits.calls.CONTEXT``) are the HCCL window, the mode, providers, the memory format of weights and what a rank may
receive. Legality and verifier use the same functions, so that both read the same values. A quantity of ``CONTEXT`` that a
reader of ``limits/calls`` gives by itself (``top_k`` of most operators) is taken from the reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_lowering.custom_ops.sizes import ceil_div
from moe_lowering.deployment import Deployment
from moe_lowering.limits import quantities
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.operands import call_weight_format
from moe_lowering.passes.operator_calls import OperatorCall, Premises
from moe_lowering.providers import same_version


def fixed_context(deployment: Deployment, spec: BlockSpec | None = None) -> dict[str, Any]:
    """The context that does not depend on T. Without ``spec``, for a call outside of any block: the deployment's part of it."""
    return {
        "buffer_bytes": deployment.hccl_buffer_bytes,
        "mode": deployment.mode,
        "equal_tokens": deployment.equal_tokens,
        "mask_is_prefix": deployment.mask_is_prefix,
        "counts_are_read": None if spec is None else spec.counts_are_read,
        **_provider("vllm_ascend", deployment),
        **_provider("cann_ops_transformer", deployment),
    }


def _provider(name: str, deployment: Deployment) -> dict[str, Any]:
    """Quantities of a provider: as it is declared, as it is installed, and whether these agree, as far as both are known."""
    declared = deployment.provider(name)
    values: dict[str, Any] = {f"has_{name}": declared is not None}
    if declared is None:
        return values
    installed = {each: (version, build) for each, version, build in deployment.installed or ()}
    version, build = installed.get(name, (None, None))
    values[f"{name}_declared"] = declared
    if version:
        values[f"{name}_installed"] = version
        values[f"{name}_is_as_declared"] = same_version(version, declared)
    if build:
        values[f"{name}_build"] = build
        values[f"{name}_is_built_for_soc"] = build == deployment.soc
    return values


def call_context(deployment: Deployment, spec: BlockSpec, premises: Premises) -> dict[str, Any]:
    """The context of a block's calls, without the memory format of weights, which each call has its own of."""
    return {**fixed_context(deployment, spec), "received": received_rows(spec, premises.tokens)}


def received_rows(spec: BlockSpec, tokens: Any) -> Any:
    """Rows that one rank may receive from all ranks, for T = ``tokens``; symbolic when that is."""
    most = ceil_div(spec.max_tokens or tokens, spec.tp_size)
    return spec.ep_size * most * min(spec.top_k, spec.local_experts)


def most_tokens(spec: BlockSpec, premises: Premises) -> int | None:
    """The proven bound on the tokens that one rank works on; None when there is none."""
    _, most = premises.prover.bounds(spec.max_tokens or premises.tokens)
    return None if most is None else ceil_div(most, spec.tp_size)


def call_quantities(
    operator: str,
    bound: Mapping[str, Any],
    stored: Mapping[str, Any],
    deployment: Deployment,
    context: Mapping[str, Any],
) -> dict[str, Any]:
    """What the rules of a call read.

    Args:
        operator: its name.
        bound: every argument; tensors may be records.
        stored: the same arguments as nodes or records, which tell whether a weight exists before the graph runs.
        deployment: declares the memory format of such weights.
        context: of ``call_context`` or ``fixed_context``.
    """
    weight_format = call_weight_format(stored, deployment.weight_format)
    return {**quantities(operator, bound), **context, "weight_format": weight_format}


def judged_quantities(
    call: OperatorCall, premises: Premises | None, deployment: Deployment, context: Mapping[str, Any]
) -> dict[str, Any]:
    """The quantities of a call that is judged, with those that only its block shows (``OperatorCall.words``)."""
    bound = call.bound(premises)
    return {**call_quantities(call.operator, bound, bound, deployment, context), **call.words}
