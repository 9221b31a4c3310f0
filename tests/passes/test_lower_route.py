"""What ``route`` becomes, kernel by kernel, and that what is left out changes no bit."""

import pytest
import reference
import torch

from moe_lowering import Deployment, MoeLowering, lowering_backend, route, testing

EXPERTS, TOP_K = 32, 4
TINY = 1e-20


def lower_and_run(logits, bias=None, soc="A3", **options):
    """Weights and ids of the lowered route, and the operators that it became."""

    def call(logits, bias):
        return route(logits, TOP_K, bias=bias, **options)

    deployment = Deployment(soc=soc)
    operators = testing.lower_graph(call, logits, bias, deployment=deployment).ops_after
    torch._dynamo.reset()
    compiled = torch.compile(call, backend=lowering_backend(MoeLowering(deployment)), fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
        return *compiled(logits, bias), operators


def rows():
    """Scores that are all equal, one that takes all, many that underflow, and random ones."""
    generator = torch.Generator().manual_seed(0)
    equal, one = torch.zeros(1, EXPERTS), torch.full((1, EXPERTS), -200.0)
    one[0, 5] = 0.0
    return torch.cat([equal, one, equal - 1e4, 40 * torch.randn(40, EXPERTS, generator=generator)])


VANISHES = {
    "softmax": {},
    "softmax, scaled": {"scale": 2.5},
    "no epsilon": {"epsilon": 0.0},
    "the largest that vanishes": {"epsilon": 0.99 * 2.0**-27 / EXPERTS},
    "best groups by their largest": {"num_groups": 4, "topk_groups": 2, "group_score": "max"},
    "composed of ATen operators": {"num_groups": 16, "topk_groups": 8, "group_score": "max"},
}
STAYS = {
    "an epsilon that counts": {"epsilon": 1e-3},
    "one that may count": {"epsilon": 2.0**-27 / EXPERTS},
    "groups that may lack the largest": {"num_groups": 4, "topk_groups": 2, "group_score": "top2_sum"},
    "a bias chooses others": {"bias": torch.linspace(-1, 1, EXPERTS)},
}


@pytest.mark.parametrize("options", VANISHES.values(), ids=VANISHES)
def test_an_epsilon_that_changes_no_bit_is_not_added(options):
    weights, ids, operators = lower_and_run(rows(), **options)
    assert "aten.sum" in operators and "aten.add" not in operators
    check_against_reference(weights, ids, **options)


@pytest.mark.parametrize("options", STAYS.values(), ids=STAYS)
def test_any_other_epsilon_is_added(options):
    weights, ids, operators = lower_and_run(rows(), **options)
    assert "aten.add" in operators
    check_against_reference(weights, ids, **options)


def check_against_reference(weights, ids, bias=None, scale=1.0, epsilon=TINY, **groups):
    """Bit by bit the generic operator; where no two scores are equal after rounding, the reference in float64."""
    logits = rows()
    generic = route(logits, TOP_K, bias=bias, scale=scale, epsilon=epsilon, **groups)
    torch.testing.assert_close((weights, ids), generic, rtol=0, atol=0)
    expected, _ = reference.route(
        logits, bias, TOP_K, "softmax", True, groups.get("num_groups", 1), groups.get("topk_groups", 1),
        groups.get("group_score", "top2_sum"), scale, epsilon,
    )  # fmt: skip
    torch.testing.assert_close(weights, expected.float())


def test_sums_where_the_epsilon_vanishes_are_sums_without_it():
    """The bound of the proof, over the least sum that E experts can have."""
    for experts in (2, 3, 8, 64, 256, 1024):
        least = torch.softmax(torch.zeros(experts), -1)[:1].sum()
        epsilon = 0.99 * 2.0**-27 / experts
        assert least + epsilon == least
        assert least / 2 + epsilon == least / 2
