"""Strategies (``graph_draws``) for ``graph_cases``. Sizes lie around the limits of the tables, and inside them mostly.

Most limits bind one implementation, and one broken limit is enough: of cases drawn freely AllGather is legal in many, MC2
and FusedMC2 in one of a hundred. So a half of them are drawn with an aim, an implementation that is to be legal (``graph_aims``).
"""

from __future__ import annotations

import math
from typing import Any

import graph_draws as st
import torch
from graph_aims import aimed, asking, sized
from graph_cases import FOREIGN, FORMS, HARMLESS, SCOPES, BlockCase, GraphCase, PairCase, RouteCase

from moe_lowering import Deployment
from moe_lowering.custom_ops.route import GROUP_SCORES, SCORINGS
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.vocabulary import ACTIVATIONS, AUTO, EXPERT_FORMATS, FIXED, GUARDS, POLICIES, SOCS, WEIGHT_FORMATS

SWIGLU = ("swiglu", 0.0)
GATES = tuple((name, 0.7 if made.clamped else 0.0) for name, made in ACTIVATIONS.items() if made.gated)
PROVIDERS = (("vllm_ascend", "0.23.0"),)
AIMS = tuple(IMPLEMENTATIONS)
COMMS = ("auto", "auto", *AIMS)
CHOOSING_POLICIES = tuple(name for name in POLICIES if name != FIXED)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@st.composite
def routes(draw: Any, experts: int, top_k: int) -> RouteCase | None:
    """None half of the time; else a routing that the generic operator accepts."""
    if not draw(st.booleans()):
        return None
    groups = [g for g in (1, 2, 4, 8) if experts % g == 0]
    num_groups = draw(st.sampled_from(groups))
    least = -(-top_k * num_groups // experts)
    score = draw(st.sampled_from(GROUP_SCORES))
    return RouteCase(
        scoring=draw(st.sampled_from(SCORINGS)),
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
    activation, limit = SWIGLU if plain else draw(st.sampled_from(GATES))
    flag = st.just(False) if plain else st.booleans()
    as_list = draw(flag) and experts <= 256
    quantisation = st.rarely(draw, *EXPERT_FORMATS)
    usual = quantisation == "none"
    tensors = (
        "w13",
        "w2",
        *(f"{n}_{what}" for n in ("w13", "w2") for what in ("bias", "scale", "offset", "scale_bias")),
    )
    forms = draw(st.dictionaries(st.sampled_from(tensors), st.sampled_from(FORMS), min_size=1, max_size=3))
    return BlockCase(
        experts=experts,
        top_k=top_k,
        intermediate=draw(st.sampled_from(intermediates)),
        activation=activation,
        limit=limit,
        alpha=draw(st.sampled_from((1.702, 1.0))),
        interleaved=draw(flag),
        as_list=(as_list, st.rarely(draw, as_list, not as_list and experts <= 256)),
        transposed=st.rarely(draw, False, True) and usual,
        bias=(draw(flag) and usual, draw(flag) and usual),
        bias_float32=draw(flag),
        quantisation=quantisation,
        route=draw(routes(experts, top_k)),
        mask=st.rarely(draw, False, True),
        forms=tuple(forms.items()) if st.rarely(draw, False, True) and experts <= 64 else (),
        odd=tuple(sorted(draw(st.sets(st.sampled_from(odd), max_size=2)))) if st.rarely(draw, False, True) else (),
    )


@st.composite
def deployments(draw: Any) -> Deployment:
    """Any SoC and group size that a deployment may have; an A3 with everything installed more often than not."""
    ep_size = draw(st.sampled_from((1, 2, 4, 8, 16, 32, 64, 1, 2, 8, 16, 9, 256, 768, 784)))
    equal = draw(st.booleans())
    most = draw(st.sampled_from((64, 256, 257, 512, 513, 1, 4096) if not equal else (0, 0, 0, 32, 512, 513)))
    tp_size = st.rarely(draw, 1, *(t for t in (2, 4) if ep_size % t == 0))
    return Deployment(
        soc=st.rarely(draw, "A3", *(soc for soc in SOCS if soc != "A3")),
        ep_size=ep_size,
        ep_rank=draw(st.integers(0, ep_size - 1)),
        ep_group="ep" if ep_size > 1 else "",
        mc2_group=st.rarely(draw, "mc2", "", "m" * 127, "m" * 128),
        tp_size=tp_size,
        tp_rank=0,
        tp_group="tp" if tp_size > 1 else "",
        max_tokens=most,
        min_tokens=min(most, draw(st.sampled_from((1, 0, 1, 32)))) if not equal else 1,
        equal_tokens=equal,
        guards=draw(st.sampled_from(GUARDS)),
        max_rows=st.rarely(draw, 0, 8, 100000),
        max_output_size=st.rarely(draw, 0, 1, 4096, 10**7),
        hccl_buffer_mb=draw(st.sampled_from((200, 1024, 4096, 1, 12))),
        weight_format=st.rarely(draw, *reversed(WEIGHT_FORMATS)),
        providers=st.rarely(draw, PROVIDERS, ()),
    )


@st.composite
def capable(draw: Any) -> Deployment:
    """An A3 on which every implementation can be legal, for at most 512 tokens."""
    ep_size = draw(st.sampled_from((2, 4, 8, 16, 32)))
    equal = draw(st.booleans())
    return Deployment(
        soc="A3", ep_size=ep_size, ep_rank=draw(st.integers(0, ep_size - 1)), ep_group="ep", mc2_group="mc2",
        max_tokens=draw(st.sampled_from((512, 64, 513) + (0,) * equal)), equal_tokens=equal,
        guards=draw(st.sampled_from(GUARDS)), hccl_buffer_mb=6140, weight_format="nz", providers=PROVIDERS,
    )  # fmt: skip


@st.composite
def arguments(draw: Any, deployment: Deployment, experts: int) -> tuple[tuple[str, Any], ...]:
    """Generic arguments that are not the deployment's; usually none."""
    if st.rarely(draw, True, False):
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
    aim = draw(st.sampled_from((None, None, None, *AIMS)))
    usual = aim is not None or draw(st.booleans())
    d = draw(capable() if usual else deployments())
    local = draw(st.sampled_from((8, 4, 1, 2, 3, 16) + (() if usual else (24, 128, 129))))
    experts = min(_local(local, aim), max(1, 12288 // d.ep_size)) * d.ep_size
    distinct = draw(st.lists(
        blocks(experts, INTERMEDIATES[: 3 if usual else None], TOP_KS, HARMLESS + SCOPES + FOREIGN), min_size=1, max_size=2
    ))  # fmt: skip
    distinct = [block.replace(arguments=draw(arguments(d, experts))) for block in distinct]
    chain = (distinct * 2)[: draw(st.sampled_from((1, 1, 2, 3)))]
    case = draw(graphs(d, chain, LEADS, (1024, 7168, 1056) if usual else HIDDENS))
    sizes = draw(st.sampled_from(("static", "static", "static", "dynamic", "strict", "unbacked")))
    low, high = draw(st.sampled_from(BOUNDS if sizes == "unbacked" else BOUNDS[:-1]))  # backed sizes begin at 2
    case = aimed(case, aim, draw) if aim else case
    if sizes != "static":
        case = case.replace(lead=tuple(max(low, min(n, high or n)) for n in case.lead) or (low,))
    symbolic = tuple(draw(st.booleans()) or not d for d in range(len(case.lead)))
    case = case.replace(sizes=sizes, symbolic=symbolic, bounds=(low, high))
    return sized(case.replace(symbolic_hidden=True, layout="chain") if draw(st.integers(0, 19)) == 19 else case)


def _local(experts: int, aim: str | None) -> int:
    """Experts on a rank: FusedMC2 takes 3 or more (16-bit weights)."""
    return max(3, experts) if aim == "fused_mc2" else experts


@st.composite
def graphs(
    draw: Any, d: Deployment, chain: list[BlockCase], leads: tuple[tuple[int, ...], ...], hiddens: tuple[int, ...]
) -> GraphCase:
    """The given blocks in a graph of static sizes."""
    comm = draw(st.sampled_from(COMMS))
    return GraphCase(
        deployment=d,
        blocks=tuple(_fitting(block) for block in chain),
        lead=(lead := draw(st.sampled_from(leads))),
        symbolic=(False,) * len(lead),
        hidden=draw(st.sampled_from(hiddens)),
        dtype=draw(st.sampled_from(DTYPES)),
        layout=st.rarely(draw, "chain", "slices", "expanded", "permuted"),
        interleave=draw(st.booleans()),
        comm=comm,
        policy=draw(st.sampled_from(CHOOSING_POLICIES if comm == "auto" else (AUTO, FIXED))),
        seed=draw(st.integers(0, 2**16)),
        keep=draw(st.sampled_from((0.5, 0.0, 0.9, 1.0))),
        skew=draw(st.booleans()),
        garbage=draw(st.booleans()),
    )


def _fitting(block: BlockCase) -> BlockCase:
    """Without lists of many experts: a thousand inputs make a slow test, and nothing new."""
    ep_size = dict(block.arguments).get("ep_size")
    return (
        block.replace(as_list=(False, False), forms=())
        if ep_size is not None and block.experts // ep_size > 130
        else block
    )


@st.composite
def local_cases(draw: Any) -> GraphCase:
    """One rank, sizes that run in milliseconds."""
    experts = draw(st.sampled_from((4, 1, 2, 3, 6, 8, 16)))
    most = draw(st.sampled_from((0, 64)))
    d = Deployment(
        soc="A3", max_tokens=most, min_tokens=0, equal_tokens=draw(st.booleans()) or not most, mc2_group="mc2",
        guards=draw(st.sampled_from(GUARDS)), weight_format="nz", providers=PROVIDERS,
    )  # fmt: skip
    distinct = draw(st.lists(blocks(experts, (8, 16, 24, 11), (2, 1, 3, 8), HARMLESS + SCOPES), min_size=1, max_size=2))
    leads = ((5,), (1,), (0,), (13,), (), (2, 3), (3, 0), (2, 2, 2))
    case = draw(graphs(d, (distinct * 2)[: draw(st.sampled_from((1, 1, 2, 3)))], leads, (16, 32, 24, 17)))
    case = asking(case, draw(st.sampled_from(("auto", "allgather", "allgather", "mc2"))))
    dynamic = math.prod(case.lead) > 1 and draw(st.booleans())
    symbolic = tuple(dynamic and n > 1 for n in case.lead)
    return sized(case.replace(sizes="dynamic" if dynamic else "static", symbolic=symbolic))


PAIR_HIDDENS = {
    "mc2": (1024,), "fused_mc2": (64, 32, 1024), "allgather": (32, 17, 1024), "alltoall": (32, 17, 1024),
    None: (1024, 32, 24),
}  # fmt: skip


@st.composite
def pair_deployments(draw: Any, soc: str, aim: str | None) -> Deployment:
    """Two ranks, at most 12 tokens each where their numbers may differ; one TP group in one case of four."""
    equal = draw(st.booleans())
    tp_size = st.rarely(draw, 1, 2)
    return Deployment(
        soc=soc, ep_size=2, ep_rank=0, ep_group="ep", mc2_group="mc2", equal_tokens=equal,
        tp_size=tp_size, tp_rank=0, tp_group="tp" if tp_size > 1 else "",
        max_tokens=st.rarely(draw, 16, 0) if equal else 12,
        min_tokens=1 if equal or aim in ("mc2", "fused_mc2") else draw(st.sampled_from((1, 0))),
        guards=draw(st.sampled_from(GUARDS)),
        max_output_size=st.rarely(draw, 0, 4096 if aim else 1), hccl_buffer_mb=1024 if aim else st.rarely(draw, 200, 1),
        weight_format="nz" if aim else st.rarely(draw, *reversed(WEIGHT_FORMATS)), providers=PROVIDERS,
    )  # fmt: skip


@st.composite
def pair_cases(draw: Any, soc: str) -> PairCase:
    """Two ranks that may hold different numbers of tokens; symbolic sizes run with others than they compile with."""
    everywhere = (None, "allgather", "alltoall", "mc2", "mc2")
    aims = (*everywhere, "mc2", *("fused_mc2",) * 4) if soc == "A3" else everywhere
    aim = draw(st.sampled_from(aims))
    d = draw(pair_deployments(soc, aim))
    local = _local(draw(st.sampled_from((3, 1, 4, 6, 2))), aim)
    odd = tuple(name for name in HARMLESS + SCOPES if name != "y_unused")
    block = draw(blocks(2 * local, (16, 32), (2, 1, 3, 4, 8), odd))
    leads = ((5,), (1,), (2, 3), (12,))
    case = draw(graphs(d, [block] * st.rarely(draw, 1, 2), leads, PAIR_HIDDENS[aim]))
    case = sized(aimed(case, aim, draw) if aim else case)
    alike = d.equal_tokens or d.tp_size > 1
    if draw(st.integers(0, 3)) == 3:
        sizes = [(n,) for n in draw(st.lists(st.integers(2, 12), min_size=4, max_size=4))]
        first, second, *others = sizes if not alike else (*sizes[:1] * 2, *sizes[1:2] * 2)
        return PairCase(case.replace(lead=first, sizes="dynamic", symbolic=(True,)), (first, second), tuple(others))
    counts = (1, 5, 9, 12) if d.min_tokens else (0, 1, 5, 9, 12)
    second = case.lead if alike else (1,) * (len(case.lead) - 1) + (draw(st.sampled_from(counts)),)
    return PairCase(case, (case.lead, second), (case.lead, second))
