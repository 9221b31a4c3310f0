"""What runs on the ranks of test_rank_placement.py: deployments whose ranks are forgotten, wrong, or another process's."""

import copy

import rank_jobs
import reference
import torch
import torch.distributed as dist
from rank_jobs import EXPERTS, TOP_K, layer, tokens_of
from torch.distributed.device_mesh import init_device_mesh

from moe_lowering import Deployment, MoE, MoeLowering, agreement, lowering_backend, moe_experts, shard_experts
from moe_lowering.functional import check_expert_map

TOKENS = 5  # no multiple of the TP group
_tp = {}


def fields(rank, tensor_parallel, **ranks):
    """All fields but the ranks; the TP group is a group of its own over both ranks."""
    if "group" not in _tp:
        _tp["group"] = dist.new_group([0, 1]).group_name
    place = rank_jobs.deployment(rank).all_fields()
    for name in ("ep_rank", "tp_rank"):
        del place[name]
    if tensor_parallel:
        place.update(tp_size=2, tp_group=_tp["group"])
    return {**place, **ranks}


def error_of(rank, tensor_parallel, comm, given):
    """Relative error against the whole layer in float64, and what ran; ``given``: are ranks given, or read from groups."""
    ranks = {"ep_rank": rank, **({"tp_rank": rank} if tensor_parallel else {})} if given else {}
    where = Deployment(**fields(rank, tensor_parallel, **ranks))
    assert (where.ep_rank, where.tp_rank) == (rank, rank if tensor_parallel else 0)
    whole = layer(torch.bfloat16)
    x = tokens_of(0 if tensor_parallel else rank, TOKENS, torch.bfloat16, False)
    weights, ids = reference.route(whole.gate(x), None, TOP_K, "softmax", True, 1, 1, "top2_sum", 1.0)
    expected = reference.moe(x, weights, ids, whole.w13, whole.w2)
    module, ran = shard_experts(layer(torch.bfloat16), where), "generic"
    with torch.no_grad():
        if comm == "generic":
            return reference.relative_error(module(x), expected), ran
        torch._dynamo.reset()
        lowering = MoeLowering(where, comm, strict=True)
        y = torch.compile(module, backend=lowering_backend(lowering), fullgraph=True)(x)
    return reference.relative_error(y, expected), lowering.reports[-1].blocks[0].comm


def refusal(rank, changes_by_rank):
    """What ``Deployment`` says of these fields on this rank."""
    try:
        Deployment(**{**fields(rank, True), **changes_by_rank.get(rank, {})})
    except ValueError as error:
        return str(error)
    return ""


def other_groups(rank):
    """Refusals of a TP group of which one rank is in no EP group, and of an MC2 group of other ranks; then of neither."""
    world, single = dist.group.WORLD.group_name, [dist.new_group([r]) for r in (0, 1)][rank].group_name
    asked = [
        {"ep_size": 1, "ep_group": single, "mc2_group": world},
        {"ep_size": 2, "ep_group": world, "mc2_group": single},
        {"ep_size": 1, "ep_group": world},
        {"ep_size": 1, "tp_size": 1, "tp_group": world},
        {"ep_size": 2, "ep_group": world},
        {"ep_size": 1, "ep_group": single},
    ]
    return [_message(lambda f=f: Deployment(**f)) for f in asked]


def _message(call):
    try:
        call()
    except Exception as error:
        return str(getattr(error, "inner_exception", None) or error)
    return ""


def uses_of(rank, stale):
    """{use: message} of a deployment that was made in another process; "" where it is taken."""
    right = Deployment(**fields(rank, False))
    module, x = shard_experts(layer(torch.bfloat16), right), tokens_of(rank, 4, torch.bfloat16, False)
    module_of_another = shard_experts(layer(torch.bfloat16), right)
    module_of_another.moe_lowering_deployment = stale
    weights, ids = torch.ones(4, 2), torch.tensor([[0, 1]] * 4, dtype=torch.int32)
    lowering = MoeLowering(right)
    gm = torch.fx.symbolic_trace(torch.nn.Identity())
    lowering.deployment = stale
    torch._dynamo.reset()
    uses = {
        "replace": lambda: stale.replace(max_tokens=64),
        "shard_experts": lambda: shard_experts(layer(torch.bfloat16), stale),
        "MoE": lambda: MoE(64, 32, EXPERTS, TOP_K, deployment=stale),
        "MoeLowering": lambda: MoeLowering(stale),
        "the pass": lambda: lowering(gm),
        "check_agreement": lambda: agreement.check_agreement(stale, timeout=20.0),
    }
    with torch.no_grad():  # communicates: on all ranks or on none
        if stale.misplaced:
            uses["moe_experts"] = lambda: moe_experts(x, weights, ids, module.w13, module.w2, deployment=stale)
            uses["compiled"] = lambda: torch.compile(module_of_another, backend="eager", fullgraph=True)(x)
        return {name: _message(use) for name, use in uses.items()}


def own_map(rank, made_before):
    """A deployment without ranks that is older than the groups: it is this rank's when it is used."""
    placed = made_before.placed()
    expert_map = torch.full((4,), -1)
    expert_map[2 * rank : 2 * rank + 2] = torch.arange(2)
    check_expert_map(expert_map, 4, placed)
    message = _message(lambda: made_before.own_experts(4))
    sharded = shard_experts(layer(torch.bfloat16), made_before).moe_lowering_deployment
    return placed.ep_rank, sharded.ep_rank, MoeLowering(made_before).deployment.ep_rank, message


def from_groups(rank):
    """Deployments from groups and meshes of two ranks, and their groups' members by name."""
    from moe_lowering.groups import find_group

    world, tp = dist.group.WORLD, dist.new_group([0, 1])
    one, mc2 = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)), dist.new_group([0, 1])
    two = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    made = {
        "groups": Deployment.from_groups(ep=world, max_tokens=64),
        "tp": Deployment.from_groups(ep=world, tp=tp, mc2=mc2),
        "none": Deployment.from_groups(ep=world, mc2_group=""),
        "alone": Deployment.from_groups(ep=None),
        "mesh": Deployment.from_mesh(one),
        "flat": Deployment.from_mesh(two, ep=("dp", "tp")),
    }
    members = {
        name: [None if (group := find_group(g)) is None else group.ranks for g in (d.ep_group, d.tp_group, d.mc2_group)]
        for name, d in made.items()
    }
    single = [dist.new_group([r]) for r in (0, 1)][rank]
    wrong = {
        "mc2 is ep": _message(lambda: Deployment.from_groups(ep=world, mc2=world)),
        "other mc2": _message(lambda: Deployment.from_groups(ep=world, mc2=single)),
        "mc2 alone": _message(lambda: Deployment.from_groups(ep=None, mc2=mc2)),
        "two names": _message(lambda: Deployment.from_groups(ep=world, mc2=mc2, mc2_group="")),
        "ep_rank": _message(lambda: Deployment.from_groups(ep=world, mc2=mc2, ep_rank=1 - rank)),
        "ep_size": _message(lambda: Deployment.from_groups(ep=world, mc2=mc2, ep_size=4)),
        "mesh": _message(lambda: Deployment.from_mesh(one, ep="experts")),
        "orthogonal": _message(lambda: Deployment.from_mesh(two, ep="dp", tp="tp", mc2_group="")),
    }
    given = made["tp"].mc2_group == mc2.group_name
    return made, members, wrong, given


def two_ep_groups(rank):
    """Four ranks in two EP groups: each gets a second group of its own."""
    from moe_lowering.groups import find_group

    pairs = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    crossing = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][rank // 2]
    where = Deployment.from_groups(ep=pairs[rank % 2], soc="A3")
    crossed = _message(lambda: Deployment.from_groups(ep=pairs[rank % 2], tp=crossing, soc="A3", mc2_group=""))
    return where, find_group(where.ep_group).ranks, find_group(where.mc2_group).ranks, crossed


def stale_agreement(rank):
    """Rank 1's deployment says rank 0, and the options' agreement says so on both ranks."""
    where = copy.copy(Deployment(**fields(rank, False)))
    lowering = MoeLowering(where)
    if rank == 1:
        object.__setattr__(where, "ep_rank", 0)
        object.__setattr__(where, "places", where.places.replace("2, 1]", "2, 0]"))
    check = []

    def ask():
        check.append(agreement.agreement_before_first(where, lowering, "auto"))
        check[0]()

    return _message(ask)
