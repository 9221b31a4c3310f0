"""A rank's place comes from its process group, and what is said of it is compared, on real gloo ranks."""

import pytest
import rank_jobs
import rank_placement_jobs
from rank_pools import Ranks
from reference import BOUNDS

from moe_lowering import Deployment, MoE, MoeLowering, shard_experts, testing
from moe_lowering.passes.implementations import IMPLEMENTATIONS

WORLD = "0"  # what torch calls the default group


@pytest.fixture(scope="module")
def pair():
    with Ranks(2, setup=rank_jobs.setup, collective_timeout=60) as ranks:
        yield ranks


@pytest.mark.parametrize("tensor_parallel", [False, True], ids=["ep", "tp"])
@pytest.mark.parametrize("comm", ["generic", *IMPLEMENTATIONS])
def test_a_forgotten_rank_is_read_from_the_group(pair, comm, tensor_parallel):
    """The twin with ranks given is the generic run: every other test of real ranks gives them."""
    for given in (False, True) if comm == "generic" else (False,):
        for error, ran in pair.run(rank_placement_jobs.error_of, tensor_parallel, comm, given):
            assert ran == comm
            assert error < max(BOUNDS.values())


WRONG = {
    "ep_rank": ({0: {"ep_rank": 1}, 1: {"ep_rank": 0}}, "ep_rank is {other}, and this process is rank {rank} of ep_group '0'"),
    "tp_rank": ({0: {"tp_rank": 1}, 1: {"tp_rank": 0}}, "tp_rank is {other}, and this process is rank {rank} of tp_group"),
    "ep_size": ({0: {"ep_size": 4}, 1: {"ep_size": 4}}, "ep_size is 4, and ep_group '0' has 2 ranks; accepted: 2"),
    "tp_size": ({0: {"tp_size": 1}, 1: {"tp_size": 1}}, "tp_size is 1, and tp_group"),
}  # fmt: skip


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_rank_or_size_is_one_clear_error(pair, field):
    changes, message = WRONG[field]
    for rank, found in enumerate(pair.run(rank_placement_jobs.refusal, changes)):
        assert message.format(rank=rank, other=1 - rank) in found
        assert f"accepted: {rank}" in found or "accepted: 2" in found
    right = {rank: {"ep_rank": rank, "tp_rank": rank} for rank in (0, 1)}
    assert pair.run(rank_placement_jobs.refusal, right) == ["", ""]
    if field.endswith("_rank"):  # one rank alone is right: the other says so alone
        assert [bool(found) for found in pair.run(rank_placement_jobs.refusal, {1: changes[1]})] == [False, True]


def test_groups_of_other_ranks(pair):
    for rank, found in enumerate(pair.run(rank_placement_jobs.other_groups)):
        assert "has global ranks [0, 1]; accepted: those of ep_group" in found[0]
        assert f"has global ranks [{rank}]; accepted: those of ep_group '0', [0, 1]" in found[1]
        assert "ep_size is 1, and ep_group '0' has 2 ranks; accepted: 2" in found[2]
        assert "tp_size is 1, and tp_group '0' has 2 ranks; accepted: 2" in found[3]
        assert found[4:] == ["", ""]


def test_a_deployment_of_another_process_is_refused_at_every_use(pair):
    """Made where there is no group (a pickle, a launcher), with rank 0's place: right on rank 0, nowhere else."""
    stale = Deployment(ep_size=2, ep_rank=0, ep_group=WORLD)
    first, second = pair.run(rank_placement_jobs.uses_of, stale)
    names_the_rank = "ep_rank is 0, and this process is rank 1 of ep_group '0' (global ranks [0, 1]); accepted: 1"
    assert {name: names_the_rank in message for name, message in second.items()} == dict.fromkeys(second, True)
    assert {"moe_experts", "compiled", "the pass", "shard_experts"} <= second.keys()
    assert names_the_rank in first.pop("check_agreement")
    assert set(first.values()) == {""}


def test_the_agreement_names_it_on_every_rank(pair):
    for found in pair.run(rank_placement_jobs.stale_agreement):
        assert "ep_rank is 0, and this process is rank 1 of ep_group '0'" in found


def test_a_deployment_older_than_its_groups_gets_its_rank_when_it_is_used(pair):
    before = Deployment(ep_size=2, ep_group=WORLD)
    assert before.ep_rank is None
    for rank, (*ranks, message) in enumerate(pair.run(rank_placement_jobs.own_map, before)):
        assert ranks == [rank] * 3
        assert "ep_rank is not known" in message  # the old one stays what it was


def test_from_groups_and_meshes(pair):
    both = (0, 1)
    for rank, (made, members, wrong, given) in enumerate(pair.run(rank_placement_jobs.from_groups)):
        assert {name: d.ep_rank for name, d in made.items()} == {**dict.fromkeys(made, rank), "alone": 0}
        assert [made[name].tp_rank for name in ("tp", "flat")] == [rank] * 2
        assert members == {
            "groups": [both, None, both], "tp": [both] * 3, "none": [both, None, None], "alone": [None] * 3,
            "mesh": [both, None, both], "flat": [both] * 3,
        }  # fmt: skip
        assert given
        assert made["groups"].ep_group != made["groups"].mc2_group != made["mesh"].mc2_group
        assert made["groups"].ep_communicator == made["mesh"].ep_communicator == made["groups"].ep_group  # gloo's
        assert made["alone"].ep_communicator == "" and made["groups"].communicators == {
            made["groups"].ep_group, made["groups"].mc2_group
        }  # fmt: skip
        assert (made["groups"].soc, made["groups"].max_tokens) == ("A3", 64)
        assert [d.field for d in made["none"].detected if d.field == "mc2_group"] == []
        said = {d.field: d.source for d in made["groups"].detected}
        assert said["soc"] == "torch.npu.get_device_name() is 'Ascend910_9391'"
        assert said["mc2_group"] == "the name of a second group over the ranks of ep"
        assert said["ep_rank"] == said["ep_size"] == "ep_group '0'"
        assert "mc2 is ep; accepted: a second group over its ranks" in wrong["mc2 is ep"]
        assert f"mc2 has global ranks [{rank}]; accepted: those of ep, [0, 1]" in wrong["other mc2"]
        assert "mc2 has global ranks [0, 1]; accepted: those of ep, []" in wrong["mc2 alone"]
        assert "mc2 and mc2_group are given; accepted: one of them" in wrong["two names"]
        assert f"ep_rank is {1 - rank}, and this process is rank {rank}" in wrong["ep_rank"]
        assert "ep_size is 4, and ep_group '0' has 2 ranks" in wrong["ep_size"]
        assert "ep is 'experts'; accepted: of the mesh's dimensions ['ep']" in wrong["mesh"]
        assert "tp_size is 2 with ep_size 1" in wrong["orthogonal"]


def test_each_of_several_ep_groups_gets_a_second_group():
    with Ranks(4) as ranks:
        found = ranks.run(rank_placement_jobs.two_ep_groups)
    for rank, (where, ep, mc2, crossed) in enumerate(found):
        assert ep == mc2 == ((0, 2), (1, 3))[rank % 2]
        assert (where.ep_rank, where.ep_size) == (rank // 2, 2)
        assert where.mc2_group != where.ep_group
        assert "accepted: some of those of ep_group" in crossed


def test_without_a_group_a_rank_is_not_known_and_nothing_takes_it_for_0():
    unknown = Deployment(ep_size=4, ep_group="ep", tp_size=2, tp_group="tp", max_tokens=64)
    assert (unknown.ep_rank, unknown.tp_rank) == (None, None)
    assert unknown.digest() == unknown.replace(ep_rank=3, tp_rank=1).digest()
    message = "ep_rank is not known: it was not given, and ep_group 'ep' is no process group that communicates"
    model = MoE(64, 32, 8, 2)
    for use in (lambda: shard_experts(model, unknown), lambda: unknown.own_experts(8), lambda: unknown.own_rank("ep")):
        with pytest.raises(ValueError, match=message):
            use()
    assert model.w13.shape[0] == 8 and model.moe_lowering_deployment is None
    assert unknown.on_shared_rank is False  # there are none
    with pytest.raises(ValueError, match=message):
        Deployment(ep_size=4, ep_group="ep", shared_expert_ranks=1).on_shared_rank  # noqa: B018
    for kind, rank in (("ep", 4), ("tp", 2), ("ep", -1), ("ep", True), ("ep", 1.0)):
        with pytest.raises(ValueError, match=f"{kind}_rank is {rank}; accepted"):
            unknown.replace(**{f"{kind}_rank": rank})


@pytest.mark.parametrize("given", [{}, {"ep_rank": 1}, {"ep_rank": 1, "tp_rank": 0}], ids=["none", "ep", "both"])
def test_the_pass_leaves_a_graph_whose_place_is_not_known(given):
    with testing.fake_deployment(ep_size=2, tp_size=2, max_tokens=64, ep_rank=1) as fake, testing.fake_tensors():
        import torch

        where = Deployment(**{**fake.all_fields(), "ep_rank": None, "tp_rank": None, **given})
        # A fake group says nothing
        assert (where.ep_rank, where.tp_rank) == (
            given.get("ep_rank"),
            given.get("tp_rank"),
        )
        model, x = MoE(64, 32, 8, 2, deployment=where), torch.empty(6, 64)
        lowered = testing.lower_graph(model, x, deployment=where, comm="allgather")
        block = lowered.report.blocks[0]
        if len(given) == 2:
            assert block.comm == "allgather"
            return
        kind = "tp" if given else "ep"
        assert block.comm is None and block.reason.startswith(f"[deployment.rank] Deployment: {kind}_rank is not known")
        with pytest.raises(Exception, match="left unlowered"):
            testing.lower_graph(model, x, deployment=where, lowering=MoeLowering(where, "allgather", strict=True))
