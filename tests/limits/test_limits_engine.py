"""The limit tables, their language, and proofs about symbolic sizes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._sympy.value_ranges import ValueRanges

import moe_lowering.custom_ops  # noqa: F401  (registers torch.ops.moe_lowering)
from moe_lowering.deployment import Deployment
from moe_lowering.limits import (
    LimitsError,
    Prover,
    Violation,
    check,
    limits_for,
    load,
)  # fmt: skip
from moe_lowering.limits.calls import OPERATORS
from moe_lowering.limits.expressions import Expression, align, ceil_div
from moe_lowering.limits.row import read
from moe_lowering.limits.table import validate
from moe_lowering.limits.versions import Constraint, do_constraints_apply

npu = torch.ops.npu
DISPATCH, FUSED, DECODE = "npu_moe_distribute_dispatch_v2", "dispatch_ffn_combine", "dispatch_gmm_combine_decode"
ROW = """
[[limit]]
code = "x.rows"
operator = "op"
value = "rows"
max = 8
source = "here.architecture"
advice = "lower it"
"""


# --------------------------------------------------------------------------------------------------------------- tables


def test_the_tables_load() -> None:
    assert len(load()) > 200
    assert {row.operator for row in load()} >= OPERATORS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("max = 8", "maximum = 8"), r"t.toml, limit 1 \(x.rows\): unknown key \['maximum'\]"),
        (('source = "here.architecture"', ""), "source is missing"),
        (('operator = "op"', ""), "operator is missing"),
        (('value = "rows"', ""), "value is missing"),
        (("max = 8", ""), "no bound; give one of"),
        (("max = 8", "max = 8\nequals = 8"), "equals and min/max; give one of"),
        (("max = 8", "max = 8\nsoc = ['A4']"), "soc is .*A4.*accepted: A2, A3, A5, 310P"),
        (('"rows"', '"rows.shape"'), "Attribute is not part of the language"),
        (('"rows"', '"rows +"'), "expression 'rows \\+'"),
        (('"rows"', '"[r for r in rows]"'), "ListComp is not part of the language"),
        (
            ("max = 8", "max = 8\nversions = ['cann']"),
            r"limit 1 \(x.rows\): version constraint 'cann'; accepted: a name",
        ),
        (("max = 8", "max = 8\nversions = ['cann~8.5']"), "version constraint 'cann~8.5'; accepted"),
        (("max = 8", "max = 8\nversions = ['cann<8.RC1']"), "version constraint 'cann<8.RC1'; accepted"),
        (("max = 8", "max = 8\nversions = ['can<8.5']"), "can has no version here; known: cann, torch_npu"),
        (("max = 8", "max = 8\nsays = '{needed_mb} MB'"), "needed_mb.* is shown, but max does not read buffer_bytes"),
        (
            ("max = 8", "max = 8\nsays = 'not in {version}'"),
            "version is shown, but the rule is not for certain versions",
        ),
    ],
)
def test_malformed_rows_are_refused(change: tuple[str, str], message: str) -> None:
    with pytest.raises(LimitsError, match=message):
        read("t.toml", ROW.replace(*change))


def test_a_code_stands_once_for_each_condition() -> None:
    with pytest.raises(LimitsError, match=r"code x.rows of op stands twice for A2"):
        validate(read("t.toml", ROW + ROW))
    other = ROW.replace('value = "rows"', 'value = "rows"\nwhen = "flag"')
    assert len(validate(read("t.toml", ROW + other))) == 2


def test_a_list_of_operators_is_a_row_for_each() -> None:
    rows = read("t.toml", ROW.replace('"op"', '["one", "two"]'))
    assert [row.operator for row in rows] == ["one", "two"]


def test_expressions_on_integers() -> None:
    assert (align(513, 512), ceil_div(0, 4), ceil_div(5, 4)) == (1024, 0, 2)
    assert Expression("2*(min(a, b) + align(a, 32))")({"a": 33, "b": 5}) == 138
    assert Expression("a in (1, 2) and not b")({"a": 2, "b": False}) is True
    assert Expression("min(a, b)").names == {"a", "b"}


# ------------------------------------------------------------------------------------------------------------- versions


@pytest.mark.parametrize(
    ("constraint", "outside", "inside"),
    [
        (
            "cann<8.5",
            ["8.5", "8.5.0", "8.5.1", "9.1.0", "v9", "9.0.RC1"],
            ["8.2", "8.3.RC2", "7", "8.5.RC1", "", "main"],
        ),
        ("cann<=8.5", ["8.5.1", "9"], ["8.5.0", "8.4"]),
        ("cann>8.5", ["8.5", "8.4.9"], ["8.5.1", "10.0"]),
        ("cann>=0.20", ["0.19.1", "0.19.1rc1"], ["0.20.2rc1", "0.20.0rc1", "0.20", "0.23.0", "1"]),
        ("cann==2.10", ["2.10.1", "2.13.0+cpu"], ["2.10.0", "2.10.0.post4"]),
    ],
)
def test_version_constraints(constraint: str, outside: list[str], inside: list[str]) -> None:
    """A row applies unless the version is known and outside; a pre-release of the very number is not known."""
    assert [v for v in outside + inside if do_constraints_apply([Constraint.parse(constraint)], {"cann": v})] == inside


def test_all_constraints_of_a_row_must_hold() -> None:
    both = [Constraint.parse(text) for text in ("vllm_ascend>=0.14", "cann<9")]
    assert do_constraints_apply(both, {})
    assert do_constraints_apply(both, {"vllm_ascend": "0.15"})
    assert not do_constraints_apply(both, {"vllm_ascend": "0.13"})
    assert not do_constraints_apply(both, {"vllm_ascend": "0.15", "cann": "9.1.0"})


def test_rules_for_versions_say_so() -> None:
    """17 routed experts are too many everywhere, 9 before CANN 8.5 only."""
    for versions, expected in (({"cann": "8.3.RC1"}, ["mc2.top_k"]), ({"cann": "8.5"}, []), ({}, ["mc2.top_k"])):
        found = check(DISPATCH, "A3", {"top_k": 9}, versions=versions)
        assert [v.code for v in found] == expected
        assert all("(a rule for cann<8.5)" in v.message for v in found)
        assert all(("declare the version of cann" in v.advice) == (not versions) for v in found)
    assert len(limits_for(DISPATCH, "A3", {"cann": "9"})) < len(limits_for(DISPATCH, "A3"))


def test_versions_of_a_deployment() -> None:
    assert Deployment().versions == {}
    declared = Deployment(cann="9.1.0", torch_npu="2.13.0", providers=(("vllm_ascend", "0.23.0"),))
    assert declared.versions == {"cann": "9.1.0", "torch_npu": "2.13.0", "vllm_ascend": "0.23.0"}


# --------------------------------------------------------------------------------------------------------------- checks

KNOWN = {"cann": "9.1.0", "torch_npu": "2.13.0", "vllm_ascend": "0.23.0", "cann_ops_transformer": "1.0.0"}
LEGAL = {
    "x_dtype": "bfloat16", "tokens": 128, "max_tokens": 128, "hidden": 7168, "top_k": 8, "experts": 256,
    "local_experts": 4, "ep_size": 64, "comm_alg": "", "shared_expert_num": 0, "buffer_bytes": 956 * 2**20,
    "shared_expert_rank_num": 0,
}  # fmt: skip


def codes(changes: dict[str, Any], soc: str = "A3", prover: Prover | None = None) -> list[str]:
    violations = check("npu_moe_distribute_dispatch_v2", soc, {**LEGAL, **changes}, prover, KNOWN)
    return [v.code for v in violations]


LARGE = {**LEGAL, "ep_size": 16, "local_experts": 16, "experts": 256}
FULL = {**LARGE, "tokens": 256, "max_tokens": 256}
V2 = {"comm_alg": "fullmesh_v2", "tp_world_size": 1}
INT8 = {"max_tokens": 512, "top_k": 8, "hidden": 7168, "weight_dtype": "int8"}


@pytest.mark.parametrize(
    ("operator", "soc", "block", "needed"),
    [
        # Source: ops_transformer.dispatch_window: H 7168, K 8, BS 128, ep 64, 4 local experts,
        # then BS 256, ep 16, 16 local experts
        (DISPATCH, "A3", LEGAL, 956),
        (DISPATCH, "A3", {**LEGAL, **V2}, 988),
        (DISPATCH, "A3", FULL, 1912),
        (DISPATCH, "A3", {**FULL, **V2}, 1976),
        (DISPATCH, "A2", LARGE, 452),
        (DISPATCH, "A2", {**LARGE, "comm_alg": "hierarchy"}, 468),  # 467.06
        # Source: vllm_ascend.ffn_tiling: the host's check of the W8A8 variant
        (FUSED, "A3", {**INT8, "max_tokens": 256}, 52),
        (FUSED, "A3", INT8, 94),
        (FUSED, "A3", {**INT8, "max_tokens": 1024}, 178),
        (FUSED, "A3", {**INT8, "max_tokens": 2048}, 346),
        # Sources: sgl_kernel_npu.fused_deep_moe: its formula; ops_transformer.mega_moe: 107.3 MB
        (DECODE, "A3", FULL, 1792),
        ("mega_moe", "A3", {**FULL, "dispatch_quant_mode": 2}, 108),
    ],
)
def test_buffer_sizes_of_the_fact_sheets(operator: str, soc: str, block: dict[str, Any], needed: int) -> None:
    """The message says what is enough: with that it is legal, with one MB less it is not."""

    def buffer_violations(mb: int) -> list[Violation]:
        found = check(operator, soc, {**block, "buffer_bytes": mb * 2**20}, versions=KNOWN)
        return [v for v in found if v.code.rpartition(".")[2] == "buffer"]

    assert buffer_violations(needed) == []
    (violation,) = buffer_violations(needed - 1)
    assert f"needs {needed} MB of HCCL window, HCCL_BUFFSIZE is {needed - 1} MB" in violation.message
    assert f"set HCCL_BUFFSIZE and Deployment.hccl_buffer_mb to {needed} MB" in violation.advice


def test_every_bound_on_the_window_says_how_much_is_enough() -> None:
    rows = [row for row in load() if "buffer_bytes" in row.names - row.value.names]
    assert len(rows) > 20
    for row in rows:
        assert row.bounds_buffer, row
        assert "{needed_mb}" in row.says, row
        assert "{needed_mb}" in row.advice, row


def test_a_window_that_no_setting_makes_large_enough() -> None:
    (violation,) = check(FUSED, "A3", {**INT8, "max_tokens": 10**6, "buffer_bytes": 2**20}, versions=KNOWN)[-1:]
    assert "needs more than 65535 MB" in violation.message
    assert "HCCL_BUFFSIZE is 65535 MB at most: lower T (Deployment.max_tokens" in violation.advice
    assert "to more than" not in violation.advice, "a setting that does not exist"
    (fits,) = check(FUSED, "A3", {**INT8, "max_tokens": 380_000, "buffer_bytes": 2**20}, versions=KNOWN)[-1:]
    assert "set HCCL_BUFFSIZE" in fits.advice


def test_a_window_for_tokens_without_an_upper_bound(symbol: Callable[[int, int], torch.SymInt]) -> None:
    """No number of MB is enough: the advice is to declare a bound, and with one it names a number again."""
    tokens = symbol(2, sys.maxsize - 1)
    unbounded = {**INT8, "max_tokens": tokens, "buffer_bytes": 2**20}
    found = check(FUSED, "A3", unbounded, versions=KNOWN)
    assert {v.code for v in found} == {"fused.window", "fused.window_output", "fused.buffer"}
    for violation in found:
        assert "needs unboundedly many MB" in violation.message
        assert "declare Deployment.max_tokens" in violation.advice
        assert "mark_dynamic" in violation.advice
        assert "HCCL_BUFFSIZE and" not in violation.advice
    declared = check(FUSED, "A3", unbounded, Prover({tokens.node.expr: (2, 512)}), KNOWN)
    assert "to 94 MB" in {v.code: v.advice for v in declared}["fused.buffer"]


@pytest.mark.parametrize(
    ("soc", "changes", "code"),
    [
        ("A3", {"tokens": 512}, None),
        ("A3", {"tokens": 513}, "mc2.tokens"),
        ("A3", {"tokens": 0}, "mc2.tokens"),
        ("A2", {"tokens": 257, "ep_size": 16}, "mc2.tokens"),
        ("A3", {"hidden": 1023}, "mc2.hidden"),
        ("A3", {"hidden": 8192}, "mc2.buffer"),
        ("A2", {"hidden": 7168 + 32, "ep_size": 16}, "mc2.hidden"),
        ("A2", {"hidden": 1000, "ep_size": 16}, "mc2.hidden_multiple"),
        ("A2", {"ep_size": 9, "experts": 252}, "mc2.ep_size"),
        ("A3", {"ep_size": 1}, "mc2.ep_size"),
        ("A5", {"ep_size": 1024, "experts": 1024, "local_experts": 1, "top_k": 1, "tokens": 1, "max_tokens": 1}, None),
        ("A3", {"ep_size": 1024, "experts": 1024, "local_experts": 1}, "mc2.ep_size"),
        ("A3", {"experts": 255}, "mc2.experts_divisible"),
        ("A3", {"shared_expert_rank_num": 4, "shared_expert_num": 2, "experts": 240, "buffer_bytes": 2**30}, None),
        ("A5", {"shared_expert_rank_num": 4, "shared_expert_num": 4, "experts": 240, "buffer_bytes": 2**30}, None),
        ("A3", {"shared_expert_rank_num": 4, "shared_expert_num": 1}, "mc2.experts_divisible"),
        ("A3", {"shared_expert_rank_num": 4, "shared_expert_num": 3, "experts": 240}, "mc2.shared_expert_ranks"),
        ("A3", {"shared_expert_rank_num": 64, "shared_expert_num": 1}, "mc2.shared_expert_ranks"),
        ("A3", {"shared_expert_rank_num": 10, "shared_expert_num": 5, "experts": 54}, "mc2.shared_experts"),
        ("A3", {"shared_expert_rank_num": 4, "shared_expert_num": 0, "experts": 240}, "mc2.shared_experts"),
        ("A3", {"shared_expert_num": 2}, "mc2.shared_experts"),
        ("A3", {"comm_alg": "hierarchy", "shared_expert_rank_num": 4, "experts": 240}, "mc2.shared_expert_ranks"),
        ("A2", {"shared_expert_rank_num": 4, "shared_expert_num": 1, "experts": 240}, "mc2.shared_expert_ranks"),
        ("A3", {"top_k": 17}, "mc2.top_k"),
        ("A3", {"local_experts": 33}, "mc2.local_experts"),
        ("310P", {}, "mc2.soc"),
    ],
)
def test_rows_of_dispatch(soc: str, changes: dict[str, Any], code: str | None) -> None:
    found = codes(changes, soc)
    assert (code in found) if code else found == []


def test_a_violation_says_what_is_wrong_and_what_to_do() -> None:
    (violation,) = check("npu_moe_distribute_dispatch_v2", "A3", {"tokens": 513, "comm_alg": ""})
    assert violation.message == "npu_moe_distribute_dispatch_v2: tokens is 513; accepted: 1 to 512"
    assert "BS_UPPER_BOUND" in violation.source
    assert "split the batch" in violation.advice


def test_a_rule_without_its_quantities_does_not_apply() -> None:
    assert check("npu_moe_distribute_dispatch_v2", "A3", {}) == []
    assert codes({"buffer_bytes": None}) == []
    assert codes({"comm_alg": None, "tokens": 10**6}) == []


# ------------------------------------------------------------------------------------------------------ symbolic sizes


@pytest.fixture
def symbol() -> Callable[[int, int], torch.SymInt]:
    """A symbolic size of a new ShapeEnv, known to lie in a range."""

    def make(low: int, high: int) -> torch.SymInt:
        env = ShapeEnv()
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC], constraint_sizes=[None])
        mode = FakeTensorMode(shape_env=env)
        size = mode.from_tensor(
            torch.empty(min((low + high) // 2, 2**40) or 3, device="meta"), symbolic_context=context
        ).shape[0]
        env.var_to_range[size.node.expr] = ValueRanges(low, high)
        return size

    return make


def test_a_limit_is_proven_for_the_whole_range(symbol: Callable[[int, int], torch.SymInt]) -> None:
    legal, too_many, hint_is_legal = symbol(2, 512), symbol(2, 513), symbol(2, 1000)
    for tokens, expected in ((legal, []), (too_many, ["mc2.tokens"]), (hint_is_legal, ["mc2.tokens"])):
        env = tokens.node.shape_env
        before = len(env.guards), dict(env.var_to_range), dict(env.replacements)
        assert codes({"tokens": tokens, "max_tokens": tokens, "buffer_bytes": 2**40}) == expected
        assert (len(env.guards), dict(env.var_to_range), dict(env.replacements)) == before, "checking added a guard"


def test_formulas_of_symbolic_sizes(symbol: Callable[[int, int], torch.SymInt]) -> None:
    tokens = symbol(2, 128)
    assert codes({"tokens": tokens, "max_tokens": tokens}) == []
    assert codes({"tokens": tokens, "max_tokens": tokens, "buffer_bytes": 955 * 2**20}) == ["mc2.buffer"]


def test_declared_bounds_are_used_and_said_to_be(symbol: Callable[[int, int], torch.SymInt]) -> None:
    tokens = symbol(2, 10**6)
    both = {"tokens": tokens, "max_tokens": tokens, "buffer_bytes": 2**50}
    assert codes(both) == ["mc2.tokens"]
    prover = Prover({tokens.node.expr: (1, 512)})
    assert codes(both, prover=prover) == []
    assert prover.used_declared
    assert codes(both, prover=Prover({tokens.node.expr: (1, 513)})) == ["mc2.tokens"]
    unused = Prover({symbol(2, 512).node.expr: (1, 100)})
    assert codes({"tokens": symbol(2, 512)}, prover=unused) == []
    assert not unused.used_declared, "what the ShapeEnv knows is enough"


def test_bounds(symbol: Callable[[int, int], torch.SymInt]) -> None:
    tokens = symbol(2, 1000)
    assert Prover().bounds(7) == (7, 7)
    assert Prover().bounds(4 * tokens) == (8, 4000)
    assert Prover({tokens.node.expr: (1, 512)}).bounds(4 * tokens) == (4, 2048)
