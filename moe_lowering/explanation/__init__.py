"""Which implementations are legal for a model's MoE blocks in a deployment, what would be chosen, and why; without a graph.

    explanation = moe_lowering.explain("deepseek_v3", Deployment(soc="A3", ep_size=16, ep_group="ep", mc2_group="mc2"))
    explanation.answer.choice  # "mc2"
    explanation.answer.judgement.verdicts["fused_mc2"].violations

1. ``describe``: a model, a config or words become a ``BlockDescription`` (``configs``, ``modules``).
2. ``Question.at``: the pass's own functions judge and choose (``answer``).
3. ``find_pieces``: where the choice changes with T (``sweep``).

Nothing is built, traced or run, and no NPU is needed: the question is about the deployment, on which torch_npu is taken to be.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch

from moe_lowering.deployment import Deployment
from moe_lowering.explanation.answer import Answer, Question
from moe_lowering.explanation.configs import NO_TYPE, describe_config
from moe_lowering.explanation.description import SIZES, BlockDescription, describe_changes
from moe_lowering.explanation.errors import ExplainError, MissingSizesError
from moe_lowering.explanation.records import Explanation
from moe_lowering.explanation.sweep import Piece, find_pieces
from moe_lowering.limits import TokenRange
from moe_lowering.model_configs.check import LARGEST
from moe_lowering.model_configs.errors import OF_NO_TYPE, ModelError
from moe_lowering.passes.policy import Policy
from moe_lowering.vocabulary import COMMS, EXPERT_FORMATS, POLICIES

__all__ = [
    "Answer",
    "BlockDescription",
    "ExplainError",
    "Explanation",
    "MissingSizesError",
    "Piece",
    "Question",
    "describe",
    "explain",
]

TOKENS = 32  # of one rank, where nothing else is said


def explain(
    model: str | os.PathLike[str] | Mapping[str, Any] | torch.nn.Module | BlockDescription | Any,
    deployment: Deployment,
    *,
    tokens: int | None = None,
    comm: str = "auto",
    policy: str = "auto",
    quantisation: str | None = None,
    sweep: tuple[int, int] | None = None,
) -> Explanation:
    """Verdicts, the choice and what sets its boundaries, for a model's MoE blocks in a deployment.

    Args:
        model: the name of a model type of transformers, a path to a config.json, its values, a config of transformers, a model
            or MoE module (on device meta too: no data is read), or a ``BlockDescription``.
        deployment: as the pass gets it. Its groups need not exist.
        tokens: T of one rank; None for 32. With ``equal_tokens=False`` the bound ``max_tokens`` is judged instead, and
            ``tokens`` must be None.
        comm, policy: as for ``MoeLowering``.
        quantisation: of the experts, as ``quantise_experts`` makes them; None for the model's own, or ``none``.
        sweep: first and last T (or declared bound) of a range: where in it the choice changes, and why.

    Returns:
        An ``Explanation``. ``answer.choice`` is the implementation that is taken, None where none is legal;
        ``answer.judgement.verdicts`` has for each the rules that it breaks, ``pieces`` the ranges of ``sweep``.

    Raises:
        ExplainError: a ValueError that names the argument, its value and what is accepted.
        ImportError: transformers' config of the model needs what is not there (torch_npu without CANN: see
            ``moe_lowering.simulator.enable``).
    """
    if not isinstance(deployment, Deployment):
        raise ExplainError("deployment", f"is {deployment!r}; accepted: a moe_lowering.Deployment")
    block = describe(model, quantisation=quantisation)
    _check(block, deployment, tokens, sweep)
    question = Question(block, deployment, _policy(comm, policy))
    answer = question.at((TOKENS if tokens is None else tokens) if deployment.equal_tokens else deployment.max_tokens)
    pieces = None if sweep is None else find_pieces(question, TokenRange(*sweep))
    return Explanation(question, answer, _assumptions(block, deployment), pieces)


def describe(
    model: Any, *, quantisation: str | None = None, dtype: torch.dtype | None = None, **sizes: int | None
) -> BlockDescription:
    """The MoE block of what ``explain`` takes as ``model``; None says that ``sizes`` tell it all.

    Args:
        quantisation: as for ``explain``. ``dtype``: of weights and activations; None for the model's own.
        sizes: ``hidden``, ``intermediate``, ``experts``, ``top_k``; each overrides the model's.

    Raises:
        ExplainError, ImportError: as ``explain``.
    """
    changes: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    if unknown := [name for name in sizes if name not in SIZES]:
        raise TypeError(f"describe: {', '.join(unknown)} are no sizes; accepted: {', '.join(SIZES)}")
    if isinstance(model, torch.nn.Module):
        from moe_lowering.explanation.modules import describe_modules  # with it dynamo, which takes a second

        try:
            model = describe_modules(model)
        except ModelError as error:  # its config
            raise ExplainError("model", str(error)) from error
    if not isinstance(model, BlockDescription):
        return describe_config(model, quantisation=quantisation or "none", dtype=dtype, **changes)
    changes |= {} if dtype is None else {"dtype": dtype}
    asked = describe_changes({name: (getattr(model, name), value) for name, value in changes.items()})
    changes |= {"changes": (*model.changes, *asked)} if model.model is not None else {}
    changes |= {} if quantisation is None else {"quantisation": quantisation}
    return dataclasses.replace(model, **changes)


def _check(block: BlockDescription, deployment: Deployment, tokens: int | None, sweep: tuple[int, int] | None) -> None:
    """What arguments say of one another."""
    if block.experts % deployment.routed_ranks:
        raise ExplainError(
            "deployment",
            f"has {deployment.routed_ranks} ranks with routed experts; accepted: a divisor of the number of experts, "
            f"{block.experts}",
        )
    if tokens is not None and not deployment.equal_tokens:
        raise ExplainError(
            "tokens",
            f"is {tokens!r}, and T is not equal on the ranks of the deployment; accepted: None, and the bound as its "
            "max_tokens",
        )
    low = 0 if deployment.equal_tokens else max(1, deployment.min_tokens)
    if tokens is not None and not _is_size(tokens, low):
        raise ExplainError("tokens", f"is {tokens!r}; accepted: an integer from 0 to {LARGEST}, or None")
    if sweep is None:
        return
    pair = isinstance(sweep, tuple) and len(sweep) == 2 and all(_is_size(end, low) for end in sweep)
    if not pair or sweep[0] > sweep[1]:
        raise ExplainError("sweep", f"is {sweep!r}; accepted: (low, high) with {low} <= low <= high <= {LARGEST}")


def _policy(comm: str, policy: str) -> Policy:
    for name, value, accepted in (("comm", comm, COMMS), ("policy", policy, POLICIES)):
        if value not in accepted:
            raise ExplainError(name, f"is {value!r}; accepted: {', '.join(accepted)}")
    try:
        return Policy(comm, policy)
    except ValueError as error:  # the two do not go together
        raise ExplainError("comm", str(error).removeprefix("MoeLowering: comm ")) from error


def _is_size(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= LARGEST


def _assumptions(block: BlockDescription, deployment: Deployment) -> tuple[str, ...]:
    """What the arguments do not say, and was taken to be so."""
    assumptions = list(block.assumptions)
    if not deployment.cann:
        assumptions.append("the CANN version is not known: rules for any version apply")
    if deployment.equal_tokens:
        assumptions.append("T is equal on all ranks")
    if deployment.providers and deployment.ep_size > 1:
        assumptions.append(f"fused mode {deployment.fused_mode}, in vLLM additional_config's enable_fused_mc2")
    if deployment.mc2_hierarchy:
        assumptions.append("prices and bytes of MC2 are those of one level: what its two levels save is not published")
    own = ", and MC2 has a communicator of its own" if deployment.mc2_group else ""
    assumptions.append(f"torch_npu is installed{own}")
    assumptions.append("the expert weights are stacked and laid out by shard_experts; there is no token mask")
    if block.routing_weights is None and block.dtype != torch.float32:
        assumptions.append(
            "the routing weights are float32: in 16 bits, as some models have them, they take a cast more or less, and near "
            "a boundary another choice"
        )
    if any(text.startswith(NO_TYPE) for text in block.assumptions):
        assumptions.append(
            f"its blocks are recognised: not checked, transformers does not know this type; {OF_NO_TYPE}"
        )
    elif block.model is not None:
        assumptions.append(f"the pass recognises the blocks of {block.model} (`moe-lowering lower` shows it)")
    if EXPERT_FORMATS[block.quantisation].quantised:
        assumptions.append("the experts are quantised as moe_lowering.quantise_experts does it")
    return tuple(assumptions)
