"""Would the pass lower a layer in every graph that vLLM compiles? Asked before the layer is taken over.

A layer that is taken over traces to the generic operators, which no device runs: if the pass then chose no
implementation, the engine could not start. So the pass's own ``decide`` is asked first, with the record that the layer
would have in the graph, for each compile range and compile size of vLLM's configuration.
"""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import torch

from moe_lowering.deployment import Deployment
from moe_lowering.integrations.vllm_deployment import deployment_for_range
from moe_lowering.integrations.vllm_layers import LayerForm, compute_layer
from moe_lowering.integrations.vllm_refusals import Refused, refuse
from moe_lowering.integrations.vllm_weights import operands_of, tensors_of
from moe_lowering.passes.block_specs import Layer, spec_of_layer
from moe_lowering.passes.decision import Decision, decide
from moe_lowering.passes.operands import ExpertOperands
from moe_lowering.passes.policy import Policy
from moe_lowering.passes.token_ranges import RUNS_WITHOUT_GUARDS
from moe_lowering.vocabulary import SWIGLU_ALPHA, VLLM_POLICIES

TOKENS_TRIED = 8  # checks of arguments do not depend on it


def token_ranges_of(vllm_config: Any, deployment: Deployment) -> list[tuple[int, int]]:
    """First and last token count of each graph that vLLM compiles. Capture sizes are no compiles: they run these graphs."""
    compilation = vllm_config.compilation_config
    ranges = [(int(each.start), int(each.end)) for each in compilation.get_compile_ranges()]
    ranges += [(int(size), int(size)) for size in compilation.compile_sizes or ()]
    return ranges or [(max(1, deployment.min_tokens), deployment.max_tokens)]


def unsplit_range(policy: Policy, deployment: Deployment, ranges: list[tuple[int, int]]) -> str:
    """A hint where a range goes on beyond MC2's capacity: a graph has one implementation, that of its largest batch; or ""."""
    capacity = deployment.mc2_capacity
    within = [(first, last) for first, last in ranges if first <= capacity < last]
    if policy.name not in VLLM_POLICIES or deployment.ep_size == 1 or not within:
        return ""
    return (
        f"[vllm.unsplit_range] one graph is for {within[0][0]} to {within[0][1]} tokens, and vllm-ascend uses MC2 up to "
        f"{capacity}; to have MC2 there, split it: compilation_config={{'compile_ranges_endpoints': [{capacity}]}}"
    )


def require_lowered(
    layer: Any, form: LayerForm, policy: Policy, deployment: Deployment, ranges: list[tuple[int, int]]
) -> None:
    """Refuse a layer for which nothing would be chosen in one of the graphs; the same on every rank.

    Raises:
        Refused: see above, with the range, the policy's reason and the rules that each implementation breaks.
    """
    tensors = tensors_of(layer, form.scheme)
    experts = len(tensors["w13"])
    if experts * deployment.routed_ranks != form.num_experts:
        value = f"{experts} of {form.num_experts} on one of {deployment.routed_ranks} ranks"
        raise refuse("uneven_experts", "the number of experts", value, "as many on each rank")
    described = Layer(
        hidden=int(tensors["w13"].shape[1]),
        intermediate=int(tensors["w2"].shape[1]),
        experts=form.num_experts,
        top_k=form.top_k,
        dtype=layer.moe_config.in_dtype,
        activation=form.activation,
        limit=0.0,
        alpha=SWIGLU_ALPHA,  # as moe_experts gives it; no activation of vLLM's here reads it
    )
    _require_accepted(layer, form)
    operands = operands_of(tensors)
    for first, last in ranges:
        if first > deployment.max_tokens:
            accepted = f"up to max_num_batched_tokens, {deployment.max_tokens}"
            raise refuse("compile_range", "a compile range", f"{first} to {last} tokens", accepted)
        decision = _decide(described, operands, form.scheme.quantisation, policy, deployment, first, last)
        if decision.comm is None:
            raise refuse(
                "not_lowered",
                f"the pass's choice for {first} to {last} tokens",
                f"none ({decision.reason}; {_broken_rules(decision)})",
                "an implementation that is legal for all of them: another policy or comm, or compile_ranges_endpoints "
                "that split the range",
            )


def _require_accepted(layer: Any, form: LayerForm) -> None:
    """Refuse what the generic operators' own checks of arguments would: they would fail the trace."""
    log2phy, dtype = layer.log2phy, layer.moe_config.in_dtype
    logical = form.num_experts if log2phy is None else int(log2phy.shape[-1])
    names = ("e_score_correction_bias", "log2phy", *form.scheme.tensors.values())
    given = {name: getattr(layer, name) for name in names}
    shapes = {name: None if value is None else value.detach().to("meta") for name, value in given.items()}
    x = torch.empty(TOKENS_TRIED, layer.w13_weight.shape[1], dtype=dtype, device="meta")
    logits = torch.empty(TOKENS_TRIED, logical, dtype=dtype, device="meta")
    try:
        compute_layer(SimpleNamespace(**shapes), form, x, logits)
    except (ValueError, TypeError) as error:
        raise Refused(f"[vllm.arguments] {error}") from error


@functools.cache
def _decide(
    described: Layer,
    tensors: ExpertOperands,
    quantisation: str,
    policy: Policy,
    deployment: Deployment,
    first: int,
    last: int,
) -> Decision:
    """Layers of a model are alike: each kind is decided once for a range."""
    narrowed = deployment_for_range(deployment, first, last)
    tokens = first if first == last else _symbolic_tokens(narrowed.min_tokens, narrowed.max_tokens)
    spec = spec_of_layer(described, narrowed, tokens, quantisation, tensors)
    # vLLM's graph has collectives of its own over these, and MC2's communicator must be none of them
    others = frozenset({narrowed.tp_group, narrowed.ep_group, narrowed.ep_communicator} - {""})
    spec = dataclasses.replace(spec, collective_groups=others)
    token = RUNS_WITHOUT_GUARDS.set(True)
    try:
        return decide(spec, narrowed, policy)
    finally:
        RUNS_WITHOUT_GUARDS.reset(token)


def _symbolic_tokens(first: int, last: int) -> Any:
    """T as it stands in a graph that is compiled for ``first`` to ``last`` tokens."""
    from torch._dynamo.source import ConstantSource  # slow to import, as is symbolic_shapes
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
    from torch.utils._sympy.value_ranges import ValueRanges

    environment, source = ShapeEnv(), ConstantSource("tokens")
    symbol = environment.create_symbol(max(last, 2), source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    environment.var_to_range[symbol] = ValueRanges(first, last)
    return environment.create_symintnode(symbol, hint=max(last, 2), source=source)


def _broken_rules(decision: Decision) -> str:
    verdicts = decision.judgement.verdicts
    broken = {name: dict.fromkeys(f"[{v.code}]" for v in verdict.violations) for name, verdict in verdicts.items()}
    return ", ".join(f"{name}: {' '.join(codes)}" for name, codes in broken.items() if codes)
