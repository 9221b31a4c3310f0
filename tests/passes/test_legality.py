"""Verdicts: each refusal by its code, with a twin that differs in one value and is accepted."""

import dataclasses
import re

import pytest
import torch

from moe_lowering import MoE, testing


@dataclasses.dataclass(frozen=True)
class Case:
    """A legal case for all three implementations; ``but`` changes one thing."""

    ep_size: int = 8
    tokens: int = 32
    hidden: int = 1024
    intermediate: int = 512
    experts: int = 64
    top_k: int = 4
    dtype: torch.dtype = torch.bfloat16
    layer: tuple = ()
    deployment: tuple = ()

    def but(self, **changes):
        return dataclasses.replace(self, **changes)

    def judge(self, **lowering):
        with testing.fake_deployment(ep_size=self.ep_size, **dict(self.deployment)) as deployment:
            with testing.fake_tensors():
                model = MoE(
                    self.hidden, self.intermediate, self.experts, self.top_k,
                    deployment=deployment, dtype=self.dtype, **dict(self.layer),
                )  # fmt: skip
                x = torch.empty(self.tokens, self.hidden, dtype=self.dtype)
            return testing.lower_graph(model, x, deployment=deployment, **lowering)


BASE = Case()

# (code, implementation, refused, accepted): the two cases differ in one value
TWINS = [
    ("mc2.x_dtype", "mc2", BASE.but(dtype=torch.float32), BASE.but(dtype=torch.float16)),
    ("fused.x_dtype", "fused_mc2", BASE.but(dtype=torch.float32), BASE.but(dtype=torch.float16)),
    ("mc2.hidden", "mc2", BASE.but(hidden=992), BASE.but(hidden=1024)),
    ("mc2.hidden", "mc2", BASE.but(hidden=8224), BASE.but(hidden=8192)),
    ("fused.hidden", "fused_mc2", BASE.but(hidden=1040), BASE.but(hidden=1056)),
    ("fused.intermediate", "fused_mc2", BASE.but(intermediate=520), BASE.but(intermediate=528)),
    ("mc2.tokens", "mc2", BASE.but(tokens=513), BASE.but(tokens=512)),
    ("mc2.tokens", "mc2", BASE.but(tokens=0), BASE.but(tokens=1)),
    ("fused.tokens", "fused_mc2", BASE.but(tokens=513), BASE.but(tokens=512)),
    ("fused.tokens", "fused_mc2", BASE.but(tokens=0), BASE.but(tokens=1)),
    ("mc2.top_k", "mc2", BASE.but(top_k=17), BASE.but(top_k=16)),
    ("mc2.experts", "mc2", BASE.but(experts=1032), BASE.but(experts=1024)),
    ("fused.local_experts", "fused_mc2", BASE.but(experts=16), BASE.but(experts=24)),
    ("fused.local_experts", "fused_mc2", BASE.but(experts=8), BASE.but(experts=24)),
    ("fused.ep_size", "fused_mc2", BASE.but(ep_size=64, experts=256), BASE.but(ep_size=32, experts=256)),
    ("fused.count_matrix", "fused_mc2", BASE.but(ep_size=32, experts=1536), BASE.but(ep_size=32, experts=1504)),
    ("mc2.ep_size", "mc2", BASE.but(ep_size=1), BASE.but(ep_size=2)),
    ("fused.ep_size", "fused_mc2", BASE.but(ep_size=1), BASE.but(ep_size=2)),
    ("mc2.buffer", "mc2", BASE.but(deployment=(("hccl_buffer_mb", 10),)), BASE.but(deployment=(("hccl_buffer_mb", 11),))),
    ("fused.window", "fused_mc2", BASE.but(tokens=512, deployment=(("hccl_buffer_mb", 11),)),
     BASE.but(tokens=512, deployment=(("hccl_buffer_mb", 12),))),
    ("fused.soc", "fused_mc2", BASE.but(deployment=(("soc", "A5"),)), BASE.but(deployment=(("soc", "A3"),))),
    ("mc2.ep_size", "mc2", BASE.but(ep_size=9, experts=63, deployment=(("soc", "A2"),)),
     BASE.but(ep_size=7, experts=63, deployment=(("soc", "A2"),))),
    ("mc2.tokens", "mc2", BASE.but(tokens=257, deployment=(("soc", "A2"),)),
     BASE.but(tokens=256, deployment=(("soc", "A2"),))),
    ("fused.provider", "fused_mc2", BASE.but(deployment=(("providers", ()),)),
     BASE.but(deployment=(("providers", (("vllm_ascend", "0.23.0"),)),))),
    ("fused.weight_format", "fused_mc2", BASE.but(deployment=(("weight_format", "nd"),)),
     BASE.but(deployment=(("weight_format", "nz"),))),
    ("fused.activation", "fused_mc2", BASE.but(layer=(("activation", "gelu"),)), BASE.but(layer=(("activation", "swiglu"),))),
    ("fused.gate_order", "fused_mc2", BASE.but(layer=(("interleaved", True),)), BASE.but(layer=(("interleaved", False),))),
    ("fused.bias", "fused_mc2", BASE.but(layer=(("expert_bias", True),)), BASE.but(layer=(("expert_bias", False),))),
    ("fused.max_output_size", "fused_mc2", BASE.but(deployment=(("max_output_size", 1023),)),
     BASE.but(deployment=(("max_output_size", 1024),))),
    ("deployment.max_tokens", "allgather", BASE.but(deployment=(("max_tokens", 31),)),
     BASE.but(deployment=(("max_tokens", 32),))),
]  # fmt: skip


@pytest.mark.parametrize(("code", "comm", "refused", "accepted"), TWINS, ids=lambda v: v if isinstance(v, str) else "")
def test_twins(code, comm, refused, accepted):
    lowered = refused.judge(comm=comm, policy="fixed")
    testing.assert_refused(lowered, code=code, comm=comm)
    assert lowered.ops_after == lowered.ops_before, "a refused block must be left as it was"
    testing.assert_lowered(accepted.judge(comm=comm), comm=comm, blocks=1)


def test_every_violation_is_listed_with_its_value_limit_and_source():
    lowered = BASE.but(dtype=torch.float32, hidden=512, tokens=600).judge(comm="mc2")
    violations = lowered.report.blocks[0].verdicts["mc2"].violations
    by_code = {v.code: v for v in violations if v.operator == "npu_moe_distribute_dispatch_v2"}
    assert {"mc2.x_dtype", "mc2.hidden", "mc2.tokens"} <= by_code.keys()
    hidden = by_code["mc2.hidden"]
    assert (hidden.quantity, hidden.value, hidden.limit.min.value) == ("hidden", 512, 1024)
    assert "512" in by_code["mc2.hidden"].message
    assert all(v.source for v in violations)


def test_a_name_takes_no_other():
    refused = BASE.but(dtype=torch.float32).judge(comm="mc2")
    assert refused.report.blocks[0].comm is None
    assert "mc2.x_dtype" in refused.report.blocks[0].reason


MEGA = (("providers", (("cann_ops_transformer", "9.2.0"),)), ("cann", "9.2.0"), ("weight_format", "nd"))


def test_mega_moe_wants_the_same_positive_token_count_on_every_rank():
    """Source: ops_transformer.mega_moe: A2 and A3, one expert a tensor, which this layer has not."""

    def codes(tokens, **fields):
        lowered = BASE.but(tokens=tokens, deployment=(*MEGA, *fields.items())).judge(comm="fused_mc2")
        return {v.code for v in lowered.report.blocks[0].verdicts["fused_mc2"].violations}

    assert codes(1) == codes(32) == {"mega_moe.weight_list"}
    assert codes(0) == {"mega_moe.weight_list", "mega_moe.tokens", "mega_moe.max_tokens"}
    unequal = {"equal_tokens": False, "max_tokens": 512}
    assert codes(32, min_tokens=1, **unequal) == {"mega_moe.weight_list", "mega_moe.equal_tokens"}
    assert codes(32, min_tokens=0, **unequal) == codes(32, min_tokens=1, **unequal) | {"mega_moe.tokens"}


UNEQUAL = (("equal_tokens", False), ("max_tokens", 512))


@pytest.mark.parametrize("tokens", [1, 7, 512])
def test_unequal_token_counts_give_one_choice_on_every_rank(tokens):
    """T of a rank does not enter the decision."""
    lowered = BASE.but(tokens=tokens, deployment=UNEQUAL).judge()
    assert lowered.report.blocks[0].comm == "fused_mc2"
    assert "moe_lowering.assert_tokens" not in lowered.ops_after


@pytest.mark.parametrize("tokens", [0, 513])
def test_a_token_count_that_the_deployment_rules_out_does_not_run(tokens):
    """The other ranks communicate as declared: this one must raise, not do something else."""
    lowered = BASE.but(tokens=tokens, deployment=UNEQUAL).judge()
    assert "the deployment declares 1 to 512 on every rank: the graph refuses to run" in lowered.report.blocks[0].reason
    names = [name for name in lowered.ops_after if name.startswith("moe_lowering.")]
    assert names == [
        "moe_lowering.route",
        "moe_lowering.assert_tokens",
        *(f"moe_lowering.{op}" for op in ("dispatch", "grouped_mlp", "combine")),
    ]


def test_unequal_dynamic_token_counts_are_asserted():
    lowered = BASE.but(deployment=UNEQUAL).judge(dynamic=True)
    testing.assert_lowered(lowered, comm="fused_mc2", ops=["moe_lowering.assert_tokens"])
    with pytest.raises(
        AssertionError, match=r"no fused_mc2 was refused with fused\.tokens; .*: fused_mc2 was legal and taken$"
    ):
        testing.assert_refused(lowered, code="fused.tokens", comm="fused_mc2")


def test_a_rank_that_may_have_no_token_rules_mc2_out_everywhere():
    declared = (("equal_tokens", False), ("max_tokens", 512), ("min_tokens", 0))
    for tokens in (0, 1, 32):
        lowered = BASE.but(tokens=tokens, deployment=declared).judge()
        assert lowered.report.blocks[0].comm == "allgather"
        testing.assert_refused(lowered, code="mc2.tokens", comm="mc2")
        broken = lowered.report.blocks[0].verdicts["mc2"].violations
        texts = [v.message for v in broken if v.code == "mc2.tokens"]
        assert texts and all("the deployment declares 0 <= T <= 512" in text for text in texts)


def test_block_and_deployment_must_agree():
    with testing.fake_deployment(ep_size=8) as deployment:
        with testing.fake_tensors():
            model = MoE(1024, 512, 64, 4, deployment=deployment, dtype=torch.bfloat16)
            x = torch.empty(32, 1024, dtype=torch.bfloat16)
        other = deployment.replace(ep_size=4)
        lowered = testing.lower_graph(model, x, deployment=other)
        testing.assert_refused(lowered, code="deployment.ep_size")
        unequal = deployment.replace(equal_tokens=False, max_tokens=64)
        testing.assert_refused(testing.lower_graph(model, x, deployment=unequal), code="deployment.token_bound")


def test_a_cap_on_rows_is_said_to_have_no_effect_on_device_operators():
    capped = BASE.but(deployment=(("max_rows", 100),)).judge(comm="mc2").report.blocks[0]
    assert capped.comm == "mc2"
    assert any(
        "max_rows = 100 bounds the generic operators and AllToAll by rows only: mc2 has" in note
        for note in capped.notes
    )
    assert not BASE.judge(comm="mc2").report.blocks[0].notes


def test_counts_read_before_the_fused_operator_could_give_them():
    """Refused by a rule, so that ``auto`` takes the next one instead of undoing."""
    ops = torch.ops.moe_lowering

    def early(x, weights, ids, w13, w2, *, late=False):
        group = (64, deployment.ep_group, 8, "", 1, 0)
        rows, scale, counts, handle = ops.dispatch(x, None, ids, None, *group, 0)
        total = None if late else counts + 1
        y = ops.grouped_mlp(rows, scale, counts, [w13], [w2], [], [], "swiglu", 0.0, 1.702, False)
        y = ops.combine(y, weights, ids, handle, None, *group)
        return y, counts + 1 if late else total

    with testing.fake_deployment(ep_size=8) as deployment:
        with testing.fake_tensors():
            args = (
                torch.empty(32, 1024, dtype=torch.bfloat16), torch.empty(32, 4), torch.empty(32, 4, dtype=torch.int32),
                torch.empty(8, 1024, 1024, dtype=torch.bfloat16), torch.empty(8, 512, 1024, dtype=torch.bfloat16),
            )  # fmt: skip
        refused = testing.lower_graph(early, *args, deployment=deployment)
        testing.assert_refused(refused, comm="fused_mc2", code="fused.early_counts")
        assert refused.report.blocks[0].comm in ("mc2", "allgather")
        accepted = testing.lower_graph(lambda *a: early(*a, late=True), *args, deployment=deployment, comm="fused_mc2")
        testing.assert_lowered(accepted, comm="fused_mc2")


@pytest.mark.parametrize(
    ("deployment", "codes"),
    [
        ((("max_tokens", 31),), r"deployment\.max_tokens"),
        ((("soc", "310P"), ("weight_format", "nd")), r"[\w.]+, [\w.]+(, [\w.]+)*"),  # no rule refuses all of them
    ],
)
def test_the_log_names_the_codes_where_nothing_is_legal(caplog, deployment, codes):
    with caplog.at_level("WARNING"):
        lowered = BASE.but(deployment=deployment).judge()
    (line,) = [text for text in caplog.messages if "left as it was" in text]
    assert re.search(rf"left as it was: no implementation is legal: \[{codes}\]$", line), line
    assert lowered.report.blocks[0].comm is None
