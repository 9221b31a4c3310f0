"""Reports say sizes in the user's words."""

import dataclasses
import re

import pytest
import torch

from moe_lowering import MoE, testing
from moe_lowering.limits import Violation
from moe_lowering.passes.naming import _written, dimension_names, in_users_words
from moe_lowering.report.records import BlockReport, Size, Verdict
from moe_lowering.report.text import render


class Model(torch.nn.Module):
    def __init__(self, deployment):
        super().__init__()
        self.moe = MoE(1024, 128, 8, 2, dtype=torch.bfloat16, deployment=deployment)

    def forward(self, hidden):
        return self.moe(hidden)


def messages(dynamic):
    with testing.fake_deployment(ep_size=2, guards="forbid") as deployment:
        x = torch.zeros(2, 300, 1024, dtype=torch.bfloat16)
        lowered = testing.lower_graph(Model(deployment), x, deployment=deployment, dynamic=dynamic)
    return [v.message for v in lowered.report.blocks[0].verdicts["mc2"].violations]


def test_a_symbolic_token_count_is_named_after_the_argument():
    found = messages(True)
    assert any("tokens is hidden.shape[0]*hidden.shape[1]; accepted: 1 to 512" in message for message in found)


def test_a_static_one_is_a_number():
    assert any("tokens is 600; accepted: 1 to 512" in message for message in messages(False))


def test_only_known_symbols_are_replaced():
    report = BlockReport("b", None, "T is s7*s8 for w13 on A3", (), (), {}, ("u1 rows",))
    said = in_users_words(report, {"s7": "x.shape[0]"})
    assert said.reason == "T is x.shape[0]*s8 for w13 on A3"
    assert said.notes == ("u1 rows",)
    assert dimension_names(3) == {}


# --------------------------------------------------------------------------------- T that the deployment declares


INTERNAL = re.compile(r"\b(?:s|u|zuf)\d+\b")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("comm", "min_tokens"), [("auto", 1), ("alltoall", 0)])
def test_with_unequal_counts_messages_speak_of_t_and_its_declared_range(comm, min_tokens, dynamic):
    fields = {"ep_size": 2, "equal_tokens": False, "max_tokens": 600, "min_tokens": min_tokens}
    with testing.fake_deployment(**fields) as deployment:
        x = torch.zeros(2, 30, 1024, dtype=torch.bfloat16)
        lowered = testing.lower_graph(Model(deployment), x, deployment=deployment, comm=comm, dynamic=dynamic)
    said = [v.message for v in lowered.report.blocks[0].verdicts["mc2"].violations]
    declared = f"tokens is T; accepted: 1 to 512; the deployment declares {min_tokens} <= T <= 600"
    assert any(declared in message for message in said)
    assert not INTERNAL.search(render(lowered.report))
    assert lowered.report.blocks[0].verdicts["alltoall"].legal  # ranks without tokens too


def test_a_refused_range_of_this_rank_alone_is_named_after_the_argument():
    with testing.fake_deployment(ep_size=2, equal_tokens=False, max_tokens=3) as deployment:
        x = torch.zeros(2, 30, 1024, dtype=torch.bfloat16)
        block = testing.lower_graph(Model(deployment), x, deployment=deployment, dynamic=True).report.blocks[0]
    assert block.reason.startswith("T is hidden.shape[0]*hidden.shape[1] and the deployment declares 1 to 3")


# ------------------------------------------------------------------------------------ numbers that the model is given


class Batched(Model):
    """T = the rows of the argument, times numbers that the model is given."""

    def forward(self, hidden, n, settings, **kwargs):
        return self.moe(hidden.expand(n, settings["m"][0], -1, -1).reshape(-1, 1024) * kwargs["scale"].sum())


def test_numbers_are_named_as_the_model_gets_them():
    with testing.fake_deployment(ep_size=2, guards="forbid") as deployment:
        x = torch.zeros(100, 1024, dtype=torch.bfloat16)
        function = Batched(deployment)
        call = lambda x, n, m, scale: function(x, n, {"m": [m]}, scale=scale)  # noqa: E731
        lowered = testing.lower_graph(call, x, 3, 5, x, deployment=deployment, dynamic=True)
        nested = testing.lower_graph(
            lambda x, settings: function(x, 3, settings, scale=x), x, {"m": [5]}, deployment=deployment, dynamic=True
        )
    for found, names in ((lowered, {"n", "m", "x.shape[0]"}), (nested, {"settings['m'][0]", "x.shape[0]"})):
        values = [v.value for v in found.report.blocks[0].verdicts["mc2"].violations if v.code == "mc2.tokens"]
        assert values and set(values[0].split("*")) - {"3"} == names
        assert not INTERNAL.search(render(found.report))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['x'].size()[0]", "x.shape[0]"),
        ("L['n']", "n"),
        ("G['N']", "N"),
        ("L['batch']['n']", "batch['n']"),
        ("L['more'][0].n", "more[0].n"),
        ("L['xs'][1].stride()[0]", "xs[1].stride(0)"),
        ("L['kwargs']['input_ids'].size()[1]", "input_ids.shape[1]"),
        ("L['self']._modules['layers']._modules['0'].n", "self.layers[0].n"),
        ("___from_numpy(L['x'])", None),
    ],
)
def test_sources_as_the_user_would_write_them(source, name):
    assert _written(source) == name


def test_sizes_and_violations_are_renamed():
    violation = Violation("c", "op", "4*s7", "at most s7", "s7 in a source", "rows is 4*s7", "lower s7")
    with testing.fake_deployment(ep_size=2) as deployment:
        x = torch.zeros(60, 1024, dtype=torch.bfloat16)
        sizes = testing.lower_graph(Model(deployment), x, deployment=deployment).report.blocks[0].sizes
    sizes = dataclasses.replace(sizes, capacity=Size("s7", 9))
    report = BlockReport("b", "mc2", "", (), (), {"mc2": Verdict("mc2", (violation,))}, sizes=sizes)
    said = in_users_words(report, {"s7": "n"})
    assert (said.sizes.capacity, said.sizes.received) == (Size("n", 9), sizes.received)
    (found,) = said.verdicts["mc2"].violations
    assert (found.value, found.limit, found.message, found.advice) == ("4*n", "at most n", "rows is 4*n", "lower n")
    assert found.source == "s7 in a source"
