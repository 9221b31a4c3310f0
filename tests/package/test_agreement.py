"""Agreement through the store: on real processes, with a rank that differs, and with one that never comes."""

import re

import pytest
import rank_jobs
import torch
from rank_pools import Ranks


@pytest.fixture(scope="module")
def four():
    with Ranks(4, collective_timeout=30) as ranks:
        yield ranks


def test_equal_deployments_agree(four):
    assert four.run(rank_jobs.agree, {}, {}, 20.0) == [""] * 4


def test_a_rank_that_differs_is_named_with_the_field_on_every_rank(four):
    messages = four.run(rank_jobs.agree, {}, {2: {"max_tokens": 64}}, 20.0)
    assert all("rank 2: Deployment.max_tokens is 64, on rank 0 128" in message for message in messages)
    assert all("rank 1" not in message and "rank 3" not in message for message in messages)


def test_of_long_values_the_part_is_shown_where_they_differ(four):
    version = "9" + ".1" * 250
    messages = four.run(rank_jobs.agree, {"cann": f"{version}.2"}, {2: {"cann": f"{version}.3"}}, 20.0)
    for message in messages:
        theirs, ours = re.search(r"rank 2: Deployment.cann is (\S+), on rank 0 (\S+)", message).groups()
        assert (theirs[-3:], ours[-3:]) == (".3'", ".2'") and theirs.startswith("...") and len(theirs) < 200


def test_ranks_own_indices_do_not_matter(four):
    """The twin: ep_rank differs on every rank, and that is agreement."""
    assert four.run(rank_jobs.agree, {"soc": "A2"}, {}, 20.0) == [""] * 4


def test_a_rank_that_does_not_come_is_named_within_the_timeout_and_told_when_it_comes(four):
    messages = four.run(rank_jobs.agree, {}, {}, 1.0, 3)
    assert messages[:3] == ["no answer from rank 3 of 4 within 1 s"] * 3
    assert messages[3] == f"this rank came too late, and has not run: the others gave up with: {messages[0]}"
    assert four.run(rank_jobs.agree, {}, {}, 20.0) == [""] * 4  # all are in step for the next


def test_groups_of_different_names_agree_and_the_passes_settings_are_compared(four):
    """TP pairs, and several EP groups in one world, have names of their own; ``comm`` must be the same."""
    names = {rank: {"tp_group": f"tp{rank // 2}", "tp_size": 2, "tp_rank": rank % 2} for rank in range(4)}
    assert four.run(rank_jobs.agree, {}, names, 20.0) == [""] * 4
    messages = four.run(rank_jobs.agree_on_settings, {1: "mc2"}, {})
    assert all("rank 1: MoeLowering's comm is 'mc2', on rank 0 'allgather'" in message for message in messages)
    assert four.run(rank_jobs.agree_on_settings, {}, {}) == [""] * 4
    messages = four.run(rank_jobs.agree_on_settings, {}, {3: "alltoall"})  # one function, that holds something else
    assert all("rank 3: MoeLowering's cost is 'rank_jobs.agree_on_settings" in message for message in messages)


def test_a_library_of_operators_on_some_ranks_only_is_named_on_every_rank(four):
    """Which operators may be emitted depends on it. The twins: all have it, or none."""
    messages = four.run(rank_jobs.agree_with_library, (0, 1, 3))
    said = "rank 2: planted::npu_swiglu_clip_quant is not loaded, on rank 0 loaded"
    assert [message.splitlines()[1:] for message in messages] == [[f"  {said}"]] * 4
    assert four.run(rank_jobs.agree_with_library, (0, 1, 2, 3)) == [""] * 4
    assert four.run(rank_jobs.agree_with_library, ()) == [""] * 4


def test_decisions_are_compared(four):
    messages = four.run(rank_jobs.agree_on_decisions, {1: ["mc2"]})
    assert all("rank 1: graph 0: it decided [['combine', 'mc2', '']]" in message for message in messages)
    assert four.run(rank_jobs.agree_on_decisions, {}) == [""] * 4
    ahead = {1: ["allgather", "mc2"]}  # a graph more, so far
    assert four.run(rank_jobs.agree_on_decisions, ahead) == [""] * 4


def test_with_unequal_tokens_ranks_compile_other_graphs_and_lower_blocks_alike(four):
    unequal = {"equal_tokens": False, "max_tokens": 64}
    others = {1: ["allgather"] * 3, 2: ["allgather", None], 3: [None]}  # None: refused on that rank, and does not run
    assert four.run(rank_jobs.agree_on_decisions, others, unequal) == [""] * 4
    messages = four.run(rank_jobs.agree_on_decisions, {2: [None, "mc2"]}, unequal)
    assert all("rank 2: combine: it decided ['mc2'], rank 0 ['allgather']" in message for message in messages)


@pytest.fixture
def fresh():
    """Each with an EP group of its own name, and collectives that wait 5 seconds."""
    with Ranks(4, setup=rank_jobs.setup, collective_timeout=5) as ranks:
        yield ranks


def test_options_compare_the_ranks_of_the_group_unless_told_otherwise(fresh):
    answers = fresh.run(rank_jobs.agree_before_first, {2: {"max_tokens": 64}})
    assert all("rank 2: Deployment.max_tokens is 64, on rank 0 0" in answer for answer in answers), answers
    assert fresh.run(rank_jobs.agree_before_first, {}) == [""] * 4
    # by content: a rank that asks for options and compiles more often does not wait for the others to do the same
    assert fresh.run(rank_jobs.agree_before_first, {}, (), "auto", (1,)) == [""] * 4
    other = {rank: {"max_tokens": 32} for rank in range(4)}  # its twin never compiles what the others do
    answers = fresh.run(rank_jobs.agree_before_first, other, (1,))
    said = "no answer from rank 1 of 4 within 5 s: it has neither compiled nor run a lowered graph"
    assert [a for a in answers if a != "silent" and not a.startswith(said)] == []


def test_a_group_of_another_size_than_the_deployment_says_is_an_error(fresh):
    for answer in fresh.run(rank_jobs.agree_with_wrong_size):
        assert "ep_size is 2, and ep_group" in answer and "has 4 ranks; accepted: 4" in answer


def test_where_there_is_nobody_to_ask():
    """One rank, a fake group, or none at all: nothing is checked by default; a word that means nothing is an error."""
    from moe_lowering import Deployment, MoeLowering, testing
    from moe_lowering.agreement import agreement_before_first

    alone = Deployment()
    assert agreement_before_first(alone, MoeLowering(alone), "auto") is None
    assert agreement_before_first(alone, MoeLowering(alone), 5.0) is None
    with testing.fake_deployment(ep_size=4) as deployment:
        agreement_before_first(deployment, MoeLowering(deployment), "auto")()
        assert agreement_before_first(deployment, MoeLowering(deployment), None) is None
    for wrong in ("never", float("nan"), -1.0, True):
        with pytest.raises(
            ValueError,
            match=f"agreement_timeout is {wrong!r}; accepted: seconds, a finite number above 0, or 'auto', or",
        ):
            agreement_before_first(alone, MoeLowering(alone), wrong)


def test_without_a_process_group_it_says_what_to_give():
    from moe_lowering import Deployment, check_agreement

    with pytest.raises(RuntimeError, match="give store, ranks and rank"):
        check_agreement(Deployment())


def test_ranks_that_did_not_agree_do_not_go_on_with_the_next_graph():
    from moe_lowering import Deployment, MoeLowering
    from moe_lowering.agreement import AgreementError
    from moe_lowering.backends.cache_key import flat_hook

    asked, answers = [], iter([True, True, False])

    def before_first():
        asked.append(1)
        if next(answers):
            raise AgreementError("ranks disagree")

    lowering = MoeLowering(Deployment())
    gm = torch.fx.symbolic_trace(torch.nn.Identity())
    hook = flat_hook(lowering, before_first=before_first)
    for _ in range(2):
        with pytest.raises(AgreementError):
            hook(gm, (), None)
    assert lowering.reports == []
    hook(gm, (), None)
    hook(gm, (), None)
    assert len(asked) == 3 and len(lowering.reports) == 2
