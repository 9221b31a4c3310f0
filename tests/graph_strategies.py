"""Hypothesis strategies for ``graph_cases``. Sizes lie around the limits of the tables, and inside them mostly."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from graph_cases import FOREIGN, HARMLESS, SCOPES, BlockCase, GraphCase, RouteCase
from hypothesis import strategies as st

from moe_lowering import Deployment

SWIGLU = ("swiglu", 0.0)
ACTIVATIONS = (SWIGLU, ("swiglu_clamp", 0.7), ("swiglu_oai", 0.7), ("gelu", 0.0), ("gelu_tanh", 0.0))
PROVIDERS = (("vllm_ascend", "0.23.0"),)
COMMS = ("auto", "auto", "allgather", "mc2", "fused_mc2")
POLICIES = ("auto", "vllm_ascend_0_13", "vllm_ascend_main")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def rarely(draw: Any, usual: Any, *others: Any) -> Any:
    """The usual value three times in four."""
    return draw(st.sampled_from((usual,) * 3 * len(others) + others)) if others else usual


@st.composite
def routes(draw: Any, experts: int, top_k: int) -> RouteCase | None:
    """None half of the time; else a routing that the generic operator accepts."""
    if not draw(st.booleans()):
        return None
    groups = [g for g in (1, 2, 4, 8) if experts % g == 0]
    num_groups = draw(st.sampled_from(groups))
    least = -(-top_k * num_groups // experts)
    score = draw(st.sampled_from(("max", "top2_sum")))
    return RouteCase(
        scoring=draw(st.sampled_from(("softmax", "sigmoid", "sqrtsoftplus"))),
        renormalize=draw(st.booleans()),
        num_groups=num_groups,
        topk_groups=draw(st.integers(least, num_groups)),
        group_score="max" if experts < 2 * num_groups else score,
        scale=draw(st.sampled_from((1.0, 2.5))),
        bias=draw(st.booleans()),
    )


@st.composite
def blocks(
    draw: Any, experts: int, intermediates: tuple[int, ...], top_ks: tuple[int, ...], odd: tuple[str, ...]
) -> BlockCase:
    """A block with plain SwiGLU and stacked weights half of the time, with few oddities."""
    top_k = min(experts, draw(st.sampled_from(top_ks)))
    plain = draw(st.booleans())
    activation, limit = SWIGLU if plain else draw(st.sampled_from(ACTIVATIONS))
    flag = st.just(False) if plain else st.booleans()
    as_list = draw(flag) and experts <= 256
    return BlockCase(
        experts=experts,
        top_k=top_k,
        intermediate=draw(st.sampled_from(intermediates)),
        activation=activation,
        limit=limit,
        alpha=draw(st.sampled_from((1.702, 1.0))),
        interleaved=draw(flag),
        as_list=(as_list, rarely(draw, as_list, not as_list and experts <= 256)),
        transposed=rarely(draw, False, True),
        bias=(draw(flag), draw(flag)),
        bias_float32=draw(flag),
        route=draw(routes(experts, top_k)),
        mask=rarely(draw, False, True),
        odd=tuple(sorted(draw(st.sets(st.sampled_from(odd), max_size=2)))) if rarely(draw, False, True) else (),
    )


@st.composite
def deployments(draw: Any) -> Deployment:
    """Any SoC and group size that a deployment may have; an A3 with everything installed more often than not."""
    ep_size = draw(st.sampled_from((1, 2, 4, 8, 16, 32, 64, 1, 2, 8, 16, 9, 256, 768, 784)))
    equal = draw(st.booleans())
    most = draw(st.sampled_from((64, 256, 257, 512, 513, 1, 4096) if not equal else (0, 0, 0, 32, 512, 513)))
    tp_size = rarely(draw, 1, *(t for t in (2, 4) if ep_size % t == 0))
    return Deployment(
        soc=rarely(draw, "A3", "A2", "A5", "310P"),
        ep_size=ep_size,
        ep_rank=draw(st.integers(0, ep_size - 1)),
        ep_group="ep" if ep_size > 1 else "",
        mc2_group=rarely(draw, "mc2", "", "m" * 127, "m" * 128),
        tp_size=tp_size,
        tp_group="tp" if tp_size > 1 else "",
        max_tokens=most,
        min_tokens=min(most, draw(st.sampled_from((1, 0, 1, 32)))) if not equal else 1,
        equal_tokens=equal,
        guards=draw(st.sampled_from(("allow", "forbid"))),
        max_rows=rarely(draw, 0, 8, 100000),
        max_output_size=rarely(draw, 0, 1, 4096, 10**7),
        hccl_buffer_mb=draw(st.sampled_from((200, 1024, 4096, 1, 12))),
        weight_format=rarely(draw, "nz", "nd"),
        providers=rarely(draw, PROVIDERS, ()),
    )


@st.composite
def capable(draw: Any) -> Deployment:
    """An A3 on which every implementation can be legal."""
    ep_size = draw(st.sampled_from((2, 4, 8, 16, 32)))
    equal = draw(st.booleans())
    return Deployment(
        soc="A3", ep_size=ep_size, ep_rank=draw(st.integers(0, ep_size - 1)), ep_group="ep", mc2_group="mc2",
        max_tokens=draw(st.sampled_from((512, 64, 513) + (0,) * equal)), equal_tokens=equal,
        guards=draw(st.sampled_from(("allow", "forbid"))), hccl_buffer_mb=8192, weight_format="nz", providers=PROVIDERS,
    )  # fmt: skip


@st.composite
def arguments(draw: Any, deployment: Deployment, experts: int) -> tuple[tuple[str, Any], ...]:
    """Generic arguments that are not the deployment's; usually none."""
    if rarely(draw, True, False):
        return ()
    name = draw(st.sampled_from(("ep_size", "ep_group", "tp_size", "max_tokens", "max_rows")))
    if name == "ep_size":
        sizes = [n for n in (1, 2, 4) if experts % n == 0 and n % deployment.tp_size == 0]
        return (("ep_size", draw(st.sampled_from(sizes))), ("ep_group", "ep")) if sizes else ()
    if name == "tp_size":
        sizes = [n for n in (1, 2) if deployment.ep_size % n == 0]
        return ("tp_size", draw(st.sampled_from(sizes))), ("tp_group", "tp")
    return ((name, "other" if name == "ep_group" else draw(st.sampled_from((0, 1, 64, 4096)))),)


TOKENS = (4, 32, 9, 1, 0, 7, 256, 257, 512, 513, 4096)
LEADS = (*((n,) for n in TOKENS), (), (2, 3), (4, 128), (2, 0), (2, 3, 4))
BOUNDS = ((2, None), (2, 64), (2, 512), (2, 513), (256, 600), (513, 4096), (0, None))
HIDDENS = (1024, 16, 1040, 1056, 7168, 7680, 8192, 8224, 65536, 24, 1)
INTERMEDIATES = (32, 512, 2048, 8, 20, 1, 32768)
TOP_KS = (2, 1, 4, 8, 16, 17)


@st.composite
def judged_cases(draw: Any) -> GraphCase:
    """Any graph at all: sizes cross the limits, nothing is run."""
    usual = draw(st.booleans())
    d = draw(capable() if usual else deployments())
    local = draw(st.sampled_from((8, 4, 1, 2, 3, 16) + (() if usual else (24, 128, 129))))
    experts = min(local, max(1, 12288 // d.ep_size)) * d.ep_size
    distinct = draw(st.lists(
        blocks(experts, INTERMEDIATES[: 3 if usual else None], TOP_KS, HARMLESS + SCOPES + FOREIGN), min_size=1, max_size=2
    ))  # fmt: skip
    distinct = [_with(block, arguments=draw(arguments(d, experts))) for block in distinct]
    chain = (distinct * 2)[: draw(st.integers(1, 3))]
    case = draw(graphs(d, chain, LEADS, (1024, 7168, 1056) if usual else HIDDENS))
    sizes = draw(st.sampled_from(("static", "static", "static", "dynamic", "strict", "unbacked")))
    low, high = draw(st.sampled_from(BOUNDS if sizes == "unbacked" else BOUNDS[:-1]))  # backed sizes begin at 2
    if sizes != "static":
        case = case.replace(lead=tuple(max(low, min(n, high or n)) for n in case.lead) or (low,))
    symbolic = tuple(draw(st.booleans()) or not d for d in range(len(case.lead)))
    case = case.replace(sizes=sizes, symbolic=symbolic, bounds=(low, high))
    return case.replace(symbolic_hidden=True, layout="chain") if draw(st.integers(0, 19)) == 19 else case


@st.composite
def graphs(
    draw: Any, d: Deployment, chain: list[BlockCase], leads: tuple[tuple[int, ...], ...], hiddens: tuple[int, ...]
) -> GraphCase:
    """The given blocks in a graph of static sizes."""
    return GraphCase(
        deployment=d,
        blocks=tuple(_fitting(block) for block in chain),
        lead=(lead := draw(st.sampled_from(leads))),
        symbolic=(False,) * len(lead),
        hidden=draw(st.sampled_from(hiddens)),
        dtype=draw(st.sampled_from(DTYPES)),
        layout=rarely(draw, "chain", "slices", "expanded", "permuted"),
        interleave=draw(st.booleans()),
        comm=draw(st.sampled_from(COMMS)),
        policy=draw(st.sampled_from(POLICIES)),
        seed=draw(st.integers(0, 2**16)),
        keep=draw(st.sampled_from((0.5, 0.0, 0.9, 1.0))),
        skew=draw(st.booleans()),
        garbage=draw(st.booleans()),
    )


def _with(block: BlockCase, **changes: Any) -> BlockCase:
    return dataclasses.replace(block, **changes)


def _fitting(block: BlockCase) -> BlockCase:
    """Without lists of many experts: a thousand inputs make a slow test, and nothing new."""
    ep_size = dict(block.arguments).get("ep_size")
    return _with(block, as_list=(False, False)) if ep_size is not None and block.experts // ep_size > 130 else block


def _fails_on_nothing(block: BlockCase) -> bool:
    """Whether a CPU kernel of the simulator fails on an empty tensor: npu_clipped_swiglu, gating_top_k with groups."""
    return block.activation == "swiglu_oai" or (block.route is not None and block.route.num_groups > 1)


@st.composite
def local_cases(draw: Any) -> GraphCase:
    """One rank, sizes that run in milliseconds."""
    experts = draw(st.sampled_from((4, 1, 2, 3, 6, 8, 16)))
    most = draw(st.sampled_from((0, 64)))
    d = Deployment(
        soc="A3", max_tokens=most, min_tokens=0, equal_tokens=draw(st.booleans()) or not most, mc2_group="mc2",
        guards=draw(st.sampled_from(("allow", "forbid"))), weight_format="nz", providers=PROVIDERS,
    )  # fmt: skip
    distinct = draw(st.lists(blocks(experts, (8, 16, 24, 11), (2, 1, 3, 8), HARMLESS + SCOPES), min_size=1, max_size=2))
    leads = ((5,), (1,), (0,), (13,), (), (2, 3), (3, 0), (2, 2, 2))
    case = draw(graphs(d, (distinct * 2)[: draw(st.integers(1, 3))], leads, (16, 32, 24, 17)))
    if 0 in case.lead and any(_fails_on_nothing(block) for block in case.blocks):
        case = case.replace(lead=(5,), symbolic=(False,))
    case = case.replace(comm=draw(st.sampled_from(("auto", "allgather", "allgather", "mc2"))))
    dynamic = math.prod(case.lead) > 1 and draw(st.booleans())
    symbolic = tuple(dynamic and n > 1 for n in case.lead)
    return case.replace(sizes="dynamic" if dynamic else "static", symbolic=symbolic)


@st.composite
def pair_cases(draw: Any) -> tuple[GraphCase, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Two ranks, and the leading dimensions on each. One of two cases is legal for all three implementations."""
    local = draw(st.sampled_from((3, 1, 4, 6, 2)))
    equal = draw(st.booleans())
    d = Deployment(
        soc="A3", ep_size=2, ep_group="ep", mc2_group="mc2", equal_tokens=equal,
        max_tokens=draw(st.sampled_from((0, 16))) if equal else 12, min_tokens=1 if equal else draw(st.sampled_from((1, 0))),
        weight_format=rarely(draw, "nz", "nd"), providers=PROVIDERS,
    )  # fmt: skip
    odd = tuple(name for name in HARMLESS + SCOPES if name != "y_unused")
    block = draw(blocks(2 * local, (16, 32), (2, 1, 3, 4, 8), odd))
    case = draw(graphs(d, [block] * draw(st.integers(1, 2)), ((5,), (1,), (2, 3), (12,)), (1024,)))
    other = (
        case.lead if equal else draw(st.sampled_from(((1,), (5,), (9,), (12,)) + (((0,),) if not d.min_tokens else ())))
    )
    if len(other) != len(case.lead):
        other = (1, *other)
    if draw(st.booleans()):
        plain = [BlockCase(block.experts, block.top_k, 32, route=block.route, odd=block.odd) for block in case.blocks]
        case = case.replace(blocks=tuple(plain), dtype=draw(st.sampled_from(DTYPES[:2])))
    return case, (case.lead, other)
