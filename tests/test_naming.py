"""Reports say sizes in the user's words."""

import torch

from moe_lowering import MoE, testing
from moe_lowering.passes.naming import dimension_names, in_users_words
from moe_lowering.report.records import BlockReport


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
