"""Policies: vllm-ascend's rules on a grid, the cost model's order, and what happens when a rule's answer is not legal.

Expected values of the grids are written from vllm-ascend's rules and its unit tests, not from the code under test.
Sources: vllm_ascend_0_13.forward_context, vllm_ascend.forward_context, vllm_ascend.unit_tests.
"""

import dataclasses
import itertools

import pytest
import torch
from test_legality import BASE

from moe_lowering import Deployment, MoE, MoeLowering, testing
from moe_lowering.passes.find_blocks import find_blocks
from moe_lowering.passes.policy import vllm_choice
from moe_lowering.passes.vllm_ascend_rules import (
    Situation,
    capacity_0_13,
    capacity_main,
    choose_0_13,
    choose_main,
)
from moe_lowering.vocabulary import SOCS

CAPACITY = 128
EPS = (1, 4, 8, 16, 32, 33, 64, 65, 128)
TOKENS = (1, 128, 129, 4097)
QUANTISATIONS = ("", "w8a8_dynamic", "w4a16")
EXPERTS = (64, 256, 512)


def expected_0_13(soc, ep, tokens, quantisation, fused):
    """One rank: AllGather. A2: MC2 for a decode batch on 16 ranks or more, AllGather otherwise. A3: the fused operator
    for W8A8 (mode 1 up to 32 ranks, any batch; mode 2 for a decode batch), else MC2 for a decode batch and AllToAll above."""
    decode = tokens <= CAPACITY
    if ep == 1:
        return "allgather"
    if soc == "A2":
        return {True: "mc2", False: "allgather"}[decode and ep >= 16]
    fused_now = {0: False, 1: ep <= 32, 2: decode}[fused] and quantisation == "w8a8_dynamic"
    if fused_now:
        return "fused_mc2"
    return "mc2" if decode else "alltoall"


@pytest.mark.parametrize("soc", ["A2", "A3"])
@pytest.mark.parametrize("fused", [0, 1, 2])
def test_0_13_on_a_grid(soc, fused):
    for ep, tokens, quantisation in itertools.product(EPS, TOKENS, QUANTISATIONS):
        s = Situation(soc, ep, tokens, CAPACITY, quantisation=quantisation, fused_mode=fused)
        assert choose_0_13(s) == expected_0_13(soc, ep, tokens, quantisation, fused), s


def expected_main(soc, ep, tokens, experts, fused, top_k):
    """One rank: AllGather. A2: MC2 needs 16 ranks, at most 24 experts a rank and a decode batch. A3: the fused operator
    up to 32 ranks whatever the batch, else MC2 or AllToAll by the batch. A5: MC2 for a decode batch, else AllGather up to
    top-k ranks and AllToAll above. 310P: AllGather."""
    decode = tokens <= CAPACITY
    if ep == 1 or soc == "310P":
        return "allgather"
    if soc == "A2":
        return "mc2" if (decode and ep >= 16 and experts // ep <= 24) else "allgather"
    if soc == "A3":
        return "fused_mc2" if (fused and ep <= 32) else ("mc2" if decode else "alltoall")
    return "mc2" if decode else ("allgather" if ep <= top_k else "alltoall")


@pytest.mark.parametrize("soc", SOCS)
@pytest.mark.parametrize("fused", [0, 1])
def test_main_on_a_grid(soc, fused):
    for ep, tokens, experts, top_k in itertools.product(EPS, TOKENS, EXPERTS, (2, 8)):
        s = Situation(soc, ep, tokens, CAPACITY, experts=experts, top_k=top_k, fused_mode=fused)
        assert choose_main(s) == expected_main(soc, ep, tokens, experts, fused, top_k), s


# Source: vllm_ascend.unit_tests
UNIT_TESTS = [
    (Situation("A2", 16, 128, 128, experts=128), "mc2"),
    (Situation("A2", 16, 129, 128, experts=128), "allgather"),
    (Situation("A3", 8, 128, 128, fused_mode=1), "fused_mc2"),
    (Situation("A3", 128, 128, 128, fused_mode=1), "mc2"),
    (Situation("A3", 8, 4097, 128, fused_mode=1), "fused_mc2"),
    (Situation("A3", 128, 4097, 128, fused_mode=1), "alltoall"),
    (Situation("A3", 8, 128, 128), "mc2"),
    (Situation("A3", 8, 129, 128), "alltoall"),
    (Situation("A5", 4, 128, 128, top_k=2), "mc2"),
    (Situation("A5", 2, 129, 128, top_k=4), "allgather"),
    (Situation("A5", 8, 129, 128, top_k=4), "alltoall"),
    (Situation("310P", 8, 1, 128), "allgather"),
    (Situation("A3", 8, 1, 128, expert_parallel=False), "allgather"),
    (Situation("A3", 8, 1, 128, lora=True), "alltoall"),
    (Situation("A3", 64, 1, 128, fused_mode=1, mega_moe=True), "fused_mc2"),
    (Situation("A3", 65, 1, 128, fused_mode=1, mega_moe=True), "mc2"),
]


@pytest.mark.parametrize(("situation", "method"), UNIT_TESTS)
def test_main_gives_its_own_unit_tests_answers(situation, method):
    assert choose_main(situation) == method


def test_0_13_excludes_what_its_conditions_name():
    legal = {"soc": "A3", "ep_size": 8, "tokens": 64, "capacity": 128, "quantisation": "w8a8_dynamic", "fused_mode": 1}
    assert choose_0_13(Situation(**legal)) == "fused_mc2"
    for change in ({"draft_model": True}, {"dynamic_eplb": True}, {"quantisation": "w4a8"}, {"ep_size": 33}):
        assert choose_0_13(Situation(**{**legal, **change})) == "mc2"
    decode = {**legal, "fused_mode": 2}
    assert choose_0_13(Situation(**decode)) == "fused_mc2"
    for change in ({"decode_fusion_allowed": False}, {"quantisation": ""}):
        assert choose_0_13(Situation(**{**decode, **change})) == "mc2"
    assert choose_0_13(Situation(**{**decode, "tokens": 129})) == "alltoall"


def test_capacities():
    """Source: vllm_ascend.unit_tests: TP 6 with 200 x 3 requests, TP 8 with 257 captured, TP 8 with 513 batched."""
    assert capacity_main(6, requests=200, query_length=3) == 600
    assert capacity_main(8, largest_captured=257) == 264
    assert capacity_main(8, prefill_batched=513) == 520
    assert capacity_main(1, largest_captured=4000) == 512
    assert capacity_main(2, prefill_batched=4000) == 1024
    assert capacity_main(1, largest_captured=9000, fused=True, mega_moe=True) == 4096
    assert capacity_0_13(6, requests=200, query_length=3) == 516
    assert capacity_0_13(8, largest_captured=257) == 264


@pytest.mark.parametrize(("choose", "mode"), [(choose_0_13, 3), (choose_main, 2), (choose_main, -1)])
def test_a_wrong_mode_is_an_error(choose, mode):
    with pytest.raises(ValueError, match=f"fused_mode is {mode}; accepted: 0, 1"):
        choose(Situation("A3", 8, 1, 128, fused_mode=mode))


def test_an_unknown_soc_is_an_error():
    with pytest.raises(ValueError, match="soc is 'A5'; accepted with expert parallelism: A2, A3"):
        choose_0_13(Situation("A5", 8, 1, 128))
    with pytest.raises(ValueError, match="soc is 'H100'"):
        choose_main(Situation("H100", 8, 1, 128))


# (policy, fused_mode, providers, ep_size, tokens, TP, quantisation, hidden, intermediate) -> the rule's method; from the
# rules of vllm-ascend. max_tokens 512, so the capacity is 512 (MegaMoe: 512 captured tokens).
# Sources: vllm_ascend_0_13.forward_context, vllm_ascend.forward_context
VLLM_ASCEND, MEGA = ("vllm_ascend", "0.23.0"), ("cann_ops_transformer", "9.1.0")
ADAPTED = [
    # 0.13: mode 1 up to 32 ranks and for any batch, W8A8 only
    ("vllm_ascend_0_13", 1, (VLLM_ASCEND,), 16, 512, 1, "w8a8", 4096, 1024, "fused_mc2"),
    ("vllm_ascend_0_13", 1, (VLLM_ASCEND,), 16, 1024, 1, "w8a8", 4096, 1024, "fused_mc2"),
    ("vllm_ascend_0_13", 1, (VLLM_ASCEND,), 64, 1024, 1, "w8a8", 4096, 1024, "alltoall"),
    ("vllm_ascend_0_13", 1, (VLLM_ASCEND,), 16, 512, 1, "none", 4096, 1024, "mc2"),
    # mode 2: for a decode batch of any number of ranks, never for prefill
    ("vllm_ascend_0_13", 2, (VLLM_ASCEND,), 64, 512, 1, "w8a8", 4096, 1024, "fused_mc2"),
    ("vllm_ascend_0_13", 2, (VLLM_ASCEND,), 16, 1024, 1, "w8a8", 4096, 1024, "alltoall"),
    # mode 0, or no library
    ("vllm_ascend_0_13", 0, (VLLM_ASCEND,), 16, 512, 1, "w8a8", 4096, 1024, "mc2"),
    ("vllm_ascend_0_13", 1, (), 16, 512, 1, "w8a8", 4096, 1024, "mc2"),
    ("vllm_ascend_0_13", 1, (MEGA,), 16, 512, 1, "w8a8", 4096, 1024, "mc2"),
    # the capacity is rounded up to TP: 513 of 514 for TP 2, and no more
    ("vllm_ascend_0_13", 0, (), 16, 513, 1, "none", 4096, 1024, "alltoall"),
    # main: 32 ranks, with MegaMoe 64, any weights that it takes
    ("vllm_ascend_main", 1, (VLLM_ASCEND,), 32, 1024, 1, "none", 4096, 1024, "fused_mc2"),
    ("vllm_ascend_main", 1, (VLLM_ASCEND,), 64, 512, 1, "none", 4096, 1024, "mc2"),
    ("vllm_ascend_main", 1, (MEGA,), 64, 4096, 1, "w4a8", 4096, 1024, "fused_mc2"),
    ("vllm_ascend_main", 1, (VLLM_ASCEND, MEGA), 64, 4096, 1, "w8a8", 4096, 1024, "fused_mc2"),
    # MegaMoe is installed and the model is not for it: hidden, width of an expert, weights
    ("vllm_ascend_main", 1, (VLLM_ASCEND, MEGA), 16, 512, 1, "none", 4096 + 256, 1024, "mc2"),
    ("vllm_ascend_main", 1, (VLLM_ASCEND, MEGA), 16, 512, 1, "none", 8192 + 512, 1024, "mc2"),
    ("vllm_ascend_main", 1, (VLLM_ASCEND, MEGA), 16, 512, 1, "none", 4096, 3072 + 512, "mc2"),
    ("vllm_ascend_main", 1, (VLLM_ASCEND, MEGA), 16, 512, 1, "none", 4096, 512, "mc2"),
    ("vllm_ascend_main", 1, (VLLM_ASCEND, MEGA), 16, 512, 1, "w4a16", 4096, 1024, "mc2"),
    ("vllm_ascend_main", 0, (VLLM_ASCEND,), 16, 512, 1, "w8a8", 4096, 1024, "mc2"),
    ("vllm_ascend_main", 0, (VLLM_ASCEND,), 16, 513, 1, "w8a8", 4096, 1024, "alltoall"),
    # a TP group of 2 takes 256 tokens of a rank each: 512 fit, and 513 do not
    ("vllm_ascend_main", 0, (), 16, 512, 2, "none", 4096, 1024, "mc2"),
    ("vllm_ascend_main", 0, (), 16, 513, 2, "none", 4096, 1024, "alltoall"),
    # refusals of the rules themselves
    ("vllm_ascend_main", 2, (VLLM_ASCEND,), 16, 512, 1, "w8a8", 4096, 1024, None),
]


def block(deployment, hidden, intermediate, quantisation):
    """A block's record; what a policy reads of it."""
    with testing.fake_tensors():
        model = MoE(hidden, intermediate, 256, 8, deployment=deployment, dtype=torch.bfloat16)
        x = torch.empty(8, hidden, dtype=torch.bfloat16)
    graph = testing.lower_graph(model, x, deployment=deployment.replace(soc="310P")).gm.graph  # refused: as it was
    spec = find_blocks(graph)[0][0].spec
    return dataclasses.replace(spec, quantisation=quantisation)


@pytest.mark.parametrize("case", ADAPTED, ids=str)
def test_rules_see_the_deployment(case):
    """The adapter between a deployment and the rules, which the grids above call directly."""
    policy, mode, providers, ep, tokens, tp, quantisation, hidden, intermediate, method = case
    size = {"ep_size": ep, "tp_size": tp, "max_tokens": 512, "fused_mode": mode, "providers": providers}
    with testing.fake_deployment(**size) as deployment:
        spec = block(deployment, hidden, intermediate, quantisation)
    found, refused = vllm_choice(policy, spec, deployment, tokens)
    assert found == method
    assert bool(refused) == (method is None)


def test_capacity_is_rounded_up_to_tp():
    """Source: vllm_ascend.unit_tests: 257 captured tokens and TP 8 make 264, MC2 up to there, AllToAll above."""
    for policy in ("vllm_ascend_0_13", "vllm_ascend_main"):
        with testing.fake_deployment(ep_size=16, tp_size=8, max_tokens=257, fused_mode=0) as deployment:
            spec = block(deployment, 1024, 512, "none")
        assert vllm_choice(policy, spec, deployment, 264)[0] == "mc2"
        assert vllm_choice(policy, spec, deployment, 265)[0] == "alltoall"


@pytest.mark.parametrize("policy", ["vllm_ascend_0_13", "vllm_ascend_main"])
def test_a_declared_capacity_is_that_of_the_rules(policy):
    """What a serving stack says itself, in place of what ``max_tokens`` would; it is no limit of the operators."""
    with testing.fake_deployment(ep_size=16, max_tokens=512, fused_mode=0, mc2_capacity=8) as deployment:
        spec = block(deployment, 1024, 512, "none")
    found = [vllm_choice(policy, spec, deployment, tokens)[0] for tokens in (8, 9)]
    assert found == ["mc2", "alltoall"]
    assert vllm_choice(policy, spec, deployment.replace(mc2_capacity=0), 9)[0] == "mc2"
    with pytest.raises(ValueError, match="Deployment: mc2_capacity is -1"):
        deployment.replace(mc2_capacity=-1)


def test_what_a_rule_itself_refuses_is_said():
    wrong = BASE.but(deployment=(("fused_mode", 2),)).judge(policy="vllm_ascend_main").report.blocks[0]
    assert wrong.comm is not None
    assert wrong.reason.startswith(
        "vllm_ascend_main refuses this deployment (fused_mode is 2; accepted: 0, 1); the simplest of those tied at 32 tokens: "
    )
    unknown = BASE.but(deployment=(("soc", "A5"),)).judge(policy="vllm_ascend_0_13").report.blocks[0]
    assert "accepted with expert parallelism: A2, A3); the simplest of those tied" in unknown.reason


def test_fused_without_a_provider_becomes_the_next_best_and_says_so():
    """Without ``fixed``; any other reason than the missing provider is a refusal."""
    plain = BASE.but(deployment=(("providers", ()),))
    found = plain.judge(comm="fused_mc2").report.blocks[0]
    assert found.comm in ("mc2", "allgather", "alltoall")
    assert found.reason.startswith(
        "fused_mc2 was asked for, and no provider of its operator is declared [fused.provider]; cheapest at 32 tokens"
    )
    fixed = plain.judge(comm="fused_mc2", policy="fixed").report.blocks[0]
    assert fixed.comm is None and fixed.reason.startswith("fused_mc2 was asked for and is not legal: ")
    assert "fused.provider" in fixed.reason
    biased = BASE.but(layer=(("expert_bias", True),)).judge(comm="fused_mc2").report.blocks[0]
    assert biased.comm is None


@pytest.mark.parametrize(("comm", "policy", "accepted"), [
    ("auto", "fixed", "allgather, alltoall, mc2, fused_mc2"),
    ("mc2", "vllm_ascend_main", "auto"),
])  # fmt: skip
def test_policies_that_do_not_go_with_comm_are_errors(comm, policy, accepted):
    with pytest.raises(ValueError, match=f"comm is '{comm}' with policy '{policy}'; accepted: {accepted}"):
        MoeLowering(Deployment(), comm, policy=policy)


def test_policy_of_main_is_followed_where_it_is_legal():
    assert BASE.judge(policy="vllm_ascend_main").report.blocks[0].comm == "fused_mc2"
    plain = BASE.but(deployment=(("providers", ()),))
    assert plain.judge(policy="vllm_ascend_main").report.blocks[0].comm == "mc2"


def test_a_rule_that_asks_for_what_is_not_legal_says_so():
    biased = BASE.but(layer=(("expert_bias", True),)).judge(policy="vllm_ascend_main").report.blocks[0]
    assert biased.comm in ("mc2", "allgather")
    assert biased.reason.startswith(
        "vllm_ascend_main selects fused_mc2, which is not legal here; cheapest at 32 tokens"
    )
    large = BASE.but(tokens=600, deployment=(("providers", ()),)).judge(policy="vllm_ascend_main").report.blocks[0]
    assert (large.comm, large.reason) == ("alltoall", "vllm_ascend_main selects it")


def test_a_cost_function_of_the_users_decides():
    def prefer(name):
        return lambda implementation, load: 0.0 if implementation == name else 1.0

    for name in ("allgather", "mc2", "fused_mc2"):
        with testing.fake_deployment(ep_size=8) as deployment, testing.fake_tensors():
            model = MoE(1024, 512, 64, 4, deployment=deployment, dtype=torch.bfloat16)
            lowering = MoeLowering(deployment, cost=prefer(name))
            x = torch.empty(32, 1024, dtype=torch.bfloat16)
            lowered = testing.lower_graph(model, x, deployment=deployment, lowering=lowering)
        testing.assert_lowered(lowered, comm=name)


@pytest.mark.parametrize(("field", "value", "accepted"), [
    ("comm", "nccl", "auto, allgather, alltoall, mc2, fused_mc2"),
    ("policy", "best", "auto, fixed, vllm_ascend_0_13, vllm_ascend_main"),
])  # fmt: skip
def test_unknown_names_are_errors(field, value, accepted):
    with pytest.raises(ValueError, match=f"{field} is '{value}'; accepted: {accepted}"):
        MoeLowering(Deployment(), **{field: value})


def raises(implementation, load):
    raise KeyError("boom")


@pytest.mark.parametrize(("broken", "says"), [(raises, "KeyError: 'boom'"), (lambda *_: float("nan"), "it gave nan")])
def test_a_cost_function_that_fails_is_named_and_the_block_left(broken, says):
    with testing.fake_deployment(ep_size=8) as deployment, testing.fake_tensors():
        model = MoE(1024, 512, 64, 4, deployment=deployment, dtype=torch.bfloat16)
        x = torch.empty(32, 1024, dtype=torch.bfloat16)
        lowering = MoeLowering(deployment, cost=broken)
        lowered = testing.lower_graph(model, x, deployment=deployment, lowering=lowering)
    (block,) = lowered.report.blocks
    assert block.comm is None
    assert "which failed for" in block.reason and says in block.reason
    assert lowered.ops_after == lowered.ops_before
