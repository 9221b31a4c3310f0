"""Checks of the arguments of ``Server``: buckets, lengths, model, and the deployment, which has a default.

Each raises a ValueError that names the argument, its value and what is accepted.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from moe_lowering.argument_checks import refuse, require_instance
from moe_lowering.deployment import Deployment
from moe_lowering.integrations.transformers import NAME, capabilities
from moe_lowering.layers.moe import MoE
from moe_lowering.serving import cache
from moe_lowering.serving.steps import ATTENTION


def check_buckets(buckets: tuple[int, ...], limit: int) -> None:
    """Ascending, and no more than npugraph_ex captures (``limit``)."""
    if not buckets or buckets[0] < 1 or list(buckets) != sorted(set(buckets)):
        raise ValueError(f"Server: buckets is {buckets}; accepted: ascending batch sizes, 1 or more")
    if limit < 1:
        raise ValueError(f"Server: capture_limit is {limit}; accepted: 1 or more")
    if len(buckets) > limit:
        raise ValueError(
            f"Server: buckets has {len(buckets)} sizes; accepted: at most capture_limit = {limit}, as each is captured"
        )


def check_lengths(lengths: tuple[int, ...], max_length: int) -> None:
    """Ends of ranges of prompt lengths: ascending up to ``max_length``."""
    if lengths[0] < 1 or list(lengths) != sorted(set(lengths)) or lengths[-1] != max_length:
        raise ValueError(
            f"Server: prefill_lengths is {lengths}; accepted: (), or ascending lengths of which the last is "
            f"max_length = {max_length}"
        )


def check_model(model: Any, max_length: int) -> None:
    """A transformers model in evaluation mode, whose experts read token masks and whose layers attend to all tokens."""
    is_model = isinstance(model, nn.Module)  # not a condition of its own: it would narrow the type
    if not is_model or not hasattr(model, "config"):
        raise refuse("Server", "model", model, "a causal language model of transformers")
    if model.training:
        raise ValueError("Server: model is in training mode; accepted: model.eval()")
    positions = getattr(model.config, "max_position_embeddings", max_length)
    if not 2 <= max_length <= positions:
        raise ValueError(
            f"Server: max_length is {max_length}; accepted: 2 to max_position_embeddings = {positions} of the model"
        )
    if model.config._attn_implementation not in ATTENTION:
        raise ValueError(
            f"Server: model has attention {model.config._attn_implementation!r}; accepted: {', '.join(ATTENTION)}"
        )
    for name, supported, reason in capabilities(model):
        if model.config._experts_implementation != NAME:
            raise ValueError(
                f"Server: model has experts implementation {model.config._experts_implementation!r}; accepted: {NAME!r} "
                "(integrations.transformers.register(), then model.set_experts_implementation)"
            )
        if not supported or isinstance(model.get_submodule(name), MoE):
            raise ValueError(
                f"Server: {name} ignores token masks ({reason}); accepted: transformers' experts that capabilities() "
                "lists as supported"
            )
    cache.check_layers(model.config, max_length)


def deployment_for(deployment: Deployment | None, tokens: int) -> Deployment:
    """The deployment that a server is made with, or one for ``tokens`` tokens when none is given."""
    if deployment is None:
        return Deployment(max_tokens=tokens)
    require_instance("Server", "deployment", deployment, Deployment, "a moe_lowering.Deployment, or None")
    if deployment.ep_size > 1:
        raise ValueError(
            f"Server: deployment.ep_size is {deployment.ep_size}; accepted: 1, as ranks do not agree on a bucket here"
        )
    if 0 < deployment.max_tokens < tokens:
        raise ValueError(
            f"Server: deployment.max_tokens is {deployment.max_tokens}; accepted: 0, or at least {tokens}, the larger of "
            "max_length and the largest bucket"
        )
    return deployment
