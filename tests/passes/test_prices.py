"""Prices of implementations: what must hold of them on a grid, whatever the constants are, and what a tie is."""

import dataclasses
import itertools
import math

import pytest
import torch

from moe_lowering import BlockDescription, Deployment
from moe_lowering.explanation.answer import Question
from moe_lowering.explanation.spec import block_spec
from moe_lowering.passes.costs import work
from moe_lowering.passes.costs.price import Price, choose_cheapest, difference_error, is_tie, price_of, price_work
from moe_lowering.passes.costs.work import Work, counted_work, valid_rows
from moe_lowering.passes.policy import Policy
from moe_lowering.prices.machines import Sent, machines, split_by_tier
from moe_lowering.prices.rates import rates_of
from moe_lowering.prices.rows import EXCHANGES, Row
from moe_lowering.report.records import Verdict
from moe_lowering.vocabulary import EXPERT_FORMATS, IMPLEMENTATION_FORMS, SOCS

TOKENS = (0, 1, 2, 3, 7, 8, 9, 16, 31, 64, 100, 128, 129, 500, 512, 1024, 4095, 4096, 16384)
FORMS = [(name, form) for name, forms in IMPLEMENTATION_FORMS.items() for form in forms]
ODD_ROWS = (  # a machine that nobody has: what must hold holds there, too
    Row("A3", "dispatch", 8, 10**6, 3.0), Row("A3", "combine", 8, 10**6, 900.0), Row("A3", "combine", 64, 10**8, 901.0),
    Row("A3", "vector", 1, 0, 40.0), Row("A3", "matmul_16bit", 1, 10**9, 0.5), Row("A3", "exchange", 2, 10**6, 0.1),
)  # fmt: skip


def deployment(form, soc="A3", ep=16, **fields):
    mode = 2 if form == "dispatch_gmm_combine_decode" else 1
    groups = {"ep_group": "ep", "mc2_group": "mc2"} if ep > 1 else {"mc2_group": "mc2"}
    library = "cann_ops_transformer" if form == "mega_moe" else "vllm_ascend"
    capture = form not in ("exact",)
    return Deployment(
        soc=soc, ep_size=ep, ep_rank=0, tp_rank=0, fused_mode=mode, providers=((library, "0.23.0"),), installed=(),
        capture=capture, **{**groups, **fields},
    )  # fmt: skip


def block(quantisation="none", **sizes):
    return BlockDescription(
        **{"hidden": 1024, "intermediate": 512, "experts": 64, "top_k": 4, **sizes}, quantisation=quantisation
    )


def price(name, form, tokens, quantisation="none", sizes=None, **fields):
    where = deployment(form, **fields)
    rates = rates_of(where.soc, where.ranks_per_node, where.measured)
    return price_of(name, form, block_spec(block(quantisation, **(sizes or {})), where, tokens), where, tokens, rates)


def exists(name, quantisation):
    return name != "fused_mc2" or quantisation != "w4a16"  # int32 weights are W4A8 to the fused operators


# ------------------------------------------------------------------------------------------------ properties on a grid

GRID = [
    {}, {"ep": 2}, {"ep": 64}, {"soc": "A2", "ep": 32}, {"soc": "A5", "ep": 8}, {"tp_size": 4, "tp_group": "tp"},
    {"max_rows": 100}, {"measured": ODD_ROWS}, {"ranks_per_node": 4}, {"unpermute_operator": "finalize_routing"},
]  # fmt: skip


@pytest.mark.parametrize("fields", GRID, ids=str)
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_more_tokens_are_never_cheaper(name, form, fields):
    for quantisation in filter(lambda q: exists(name, q), ("none", "w8a8")):
        found = [price(name, form, tokens, quantisation, **fields).ns for tokens in TOKENS]
        assert found == sorted(found)
        assert found[0] > 0 and found[-1] > found[0]


@pytest.mark.parametrize(("name", "form"), FORMS)
@pytest.mark.parametrize("larger", ["hidden", "intermediate", "top_k"])
def test_larger_layers_are_never_cheaper(name, form, larger):
    for tokens in TOKENS:
        found = [price(name, form, tokens, sizes={larger: size}).ns for size in (2, 4)] if larger == "top_k" else [
            price(name, form, tokens, sizes={larger: size}).ns for size in (1024, 2048)
        ]  # fmt: skip
        assert found[0] <= found[1]


@pytest.mark.parametrize("more", ["moved", "operations", "experts", "sent", "back", "kernels"])
@pytest.mark.parametrize("what", ["vector", "exchange", "dispatch", "combine", "matmul", "fused"])
def test_more_work_is_never_cheaper(what, more):
    rates = rates_of("A3")
    sizes = {"operations": (10**9, 10**9), "rate": "matmul_16bit", "experts": (10**6, 10**6), "rows": 9, "local": 4}
    plain = Work(what, 1, 10**6, **sizes, sent=Sent(10**6, 10**6), back=Sent(10**6, 0), ranks=8)
    value = getattr(plain, more)
    doubled = value + value if more in ("sent", "back") else 2 * value if isinstance(value, int) else (10**12, 10**12)
    assert price_work([dataclasses.replace(plain, **{more: doubled})], rates).ns >= price_work([plain], rates).ns


@pytest.mark.parametrize("soc", SOCS)
@pytest.mark.parametrize("what", EXCHANGES)
def test_more_ranks_are_never_cheaper_per_byte(soc, what):
    for ranks_per_node in (0, 1, 4, 16, 64):
        rates, size = rates_of(soc, ranks_per_node), 2**40
        per_byte = []
        for ranks in (2, 4, 8, 16, 32, 64, 128, 256):
            sent = split_by_tier(size, ranks, rates.ranks_per_node)
            per_byte.append(rates.link(sent) * rates.law(what).factor(ranks) / (sent.within + sent.between))
        assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(per_byte))
    assert rates.latency(256) >= rates.latency(2) > 0


@pytest.mark.parametrize("fields", GRID, ids=str)
@pytest.mark.parametrize("form", IMPLEMENTATION_FORMS["fused_mc2"])
def test_fused_is_never_dearer_than_its_parts(form, fields):
    """Its parts are MC2's operators, with the same rows and experts."""
    for quantisation in ("none", "w8a8", "w4a8"):
        for tokens in TOKENS:
            whole = price("fused_mc2", form, tokens, quantisation, **fields)
            parts = price("mc2", "mc2", tokens, quantisation, **fields)
            assert whole.ns <= parts.ns
            assert whole.ns + whole.hidden_ns <= parts.ns  # even where nothing is hidden


def test_what_is_hidden_makes_the_fused_operator_cheaper():
    """The twin: without overlap it would cost as much as the sum."""
    fused = price("fused_mc2", "dispatch_ffn_combine", 4096)
    assert 0 < fused.hidden_ns < fused.ns
    assert fused.error_us >= fused.hidden_ns / 1000


# ------------------------------------------------------------------------------------------------ what decides between them


def test_bytes_cross_where_ep_is_top_k():
    """Every token to every rank is (ep - 1) T rows, to its experts k T (ep - 1) / ep: the crossing is at ep = k for many."""
    sizes = {"hidden": 7168, "intermediate": 512, "experts": 256, "top_k": 8}
    cheaper = {
        ep: price("allgather", "allgather", 8192, sizes=sizes, ep=ep).ns
        < price("alltoall", "exact", 8192, sizes=sizes, ep=ep).ns
        for ep in (2, 4, 16, 32)
    }
    assert cheaper == {2: True, 4: True, 16: False, 32: False}


def test_exact_splits_are_priced_as_such():
    """DeepSeek-V3's prefill: equal splits send every token to every rank."""
    sizes = {"hidden": 7168, "intermediate": 2048, "experts": 256, "top_k": 8}
    exact, static = (price("alltoall", form, 4096, sizes=sizes, ep=64) for form in ("exact", "static"))
    where = deployment("exact", ep=64)
    spec = dataclasses.replace(block_spec(block(**sizes), where, 1), tokens=None)
    assert exact.ns * 3 < static.ns
    small = [counted_work("alltoall", form, spec, where, 1, 16) for form in ("exact", "static")]
    assert len(small[0]) > 2 * len(small[1])  # its many small kernels


def test_max_rows_is_in_the_price_of_buffers():
    without, with_cap = (price("alltoall", "buffers", 512, max_rows=rows).ns for rows in (10**6, 100))
    assert with_cap < without
    assert price("alltoall", "static", 512, max_rows=100).ns == price("alltoall", "static", 512).ns


def test_nodes_have_slower_links_between_them():
    """64 ranks in nodes of 8 on A2, where RoCE is between nodes; as one node they pay what A3 pays."""
    one, many = (price("mc2", "mc2", 512, soc="A2", ep=64, ranks_per_node=ranks).ns for ranks in (64, 8))
    assert one < many
    assert many == price("mc2", "mc2", 512, soc="A2", ep=64).ns  # the default is the SoC's server
    flat = machines()["A3"]
    assert flat.within.gb_s == flat.between.gb_s
    assert price("mc2", "mc2", 512, ep=64).ns == price("mc2", "mc2", 512, ep=64, ranks_per_node=64).ns


def test_int8_rates_and_rows():
    sizes = {"hidden": 7168, "intermediate": 2048, "experts": 256, "top_k": 8}
    full, int8 = (price("mc2", "mc2", 4096, quantisation, sizes=sizes, ep=64).ns for quantisation in ("none", "w8a8"))
    assert int8 * 2 < full


def test_shared_expert_ranks_leave_more_rows_to_the_others():
    plain, shared = (price("mc2", "mc2", 512, sizes={"experts": 96}, ep=16, shared_expert_ranks=n).ns for n in (0, 4))
    assert plain < shared
    where = deployment("mc2", shared_expert_ranks=4)
    assert valid_rows(block_spec(block(experts=96), where, 512), 512) == 512 * 4 * 16 // 12


def test_a_share_of_the_tp_group_is_priced():
    """T counts in whole shares, so that no price falls where one is full."""
    found = [price("mc2", "mc2", tokens, tp_size=4, tp_group="tp").ns for tokens in (5, 6, 8, 9)]
    assert found[0] == found[1] == found[2] < found[3]
    assert found[0] > price("mc2", "mc2", 2).ns  # and the results are gathered


# ------------------------------------------------------------------------------------------------ the same on every rank


@pytest.mark.parametrize(("name", "form"), FORMS)
@pytest.mark.parametrize(
    "fields", [{}, {"max_tokens": 64, "equal_tokens": False}, {"tp_size": 2, "tp_group": "tp"}], ids=str
)
def test_a_price_is_the_same_on_every_rank(name, form, fields):
    found = set()
    for rank in (0, 3, 7):
        place = {"ep_rank": rank, "tp_rank": rank % 2 if "tp_size" in fields else 0}
        where = deployment(form, ep=8, **fields).replace(**place)
        spec = block_spec(block(), where, 64)
        of_shared = dataclasses.replace(spec, key=(rank,), tokens=rank)
        found.add(price_of(name, form, of_shared, where, 64, rates_of("A3")))
    assert len(found) == 1


def test_ranks_with_shared_experts_have_the_price_of_the_others():
    found = set()
    for rank, on_shared in ((0, True), (1, True), (5, False)):
        where = deployment("mc2", ep=8, shared_expert_ranks=2).replace(ep_rank=rank)
        spec = dataclasses.replace(block_spec(block(experts=48), where, 64), on_shared_rank=on_shared)
        found.add(price_of("mc2", "mc2", spec, where, 64, rates_of("A3")))
    assert len(found) == 1


@pytest.mark.parametrize(("name", "form"), FORMS)
@pytest.mark.parametrize(
    "fields", [{}, {"max_rows": 500}, {"tp_size": 2, "tp_group": "tp"}, {"shared_expert_ranks": 2}], ids=str
)
def test_the_line_between_two_counts_is_the_count(name, form, fields):
    """Prices at any T are read off a line; counted at that T they are the same."""
    where = deployment(form, ep=8, **fields)
    sizes = {"experts": 48} if "shared_expert_ranks" in fields else {}
    rates = rates_of("A3")
    for quantisation in filter(lambda q: exists(name, q), EXPERT_FORMATS):
        for shares in (48, 96, 480, 9600):  # of which each rank and node gets whole rows
            tokens = shares * where.tp_size
            spec = dataclasses.replace(block_spec(block(quantisation, **sizes), where, tokens), tokens=None)
            counted = counted_work(name, form, spec, where, tokens, rates.ranks_per_node)
            assert price_of(name, form, spec, where, tokens, rates) == price_work(counted, rates)


# ------------------------------------------------------------------------------------------------ ties


def test_errors_of_what_two_prices_share_cancel():
    one, other = (
        Price((("memory", 10_000, 0.5), ("start", 100, 0.1))),
        Price((("memory", 10_000, 0.5), ("start", 200, 0.1))),
    )
    assert one.error_us > 1
    assert difference_error(one, other) == pytest.approx(10)
    assert not is_tie(one, other) and not is_tie(other, one)
    unlike = Price((("links", 10_100, 0.5), ("start", 100, 0.1)))
    assert is_tie(one, unlike) and is_tie(unlike, one)
    assert difference_error(one, unlike) == pytest.approx(math.hypot(5_000, 5_050))


def test_a_tie_goes_to_the_simpler_one_and_the_reason_says_so(monkeypatch):
    cheap = Price((("links", 99_000, 0.1),))
    prices = {
        "mc2": cheap,
        "allgather": Price((("memory", 100_000, 0.1),)),
        "fused_mc2": Price((("memory", 500_000, 0.1),)),
    }
    assert choose_cheapest(prices, {}) == ("allgather", ("mc2",))
    sharp = {**prices, "mc2": Price((("memory", 80_000, 0.1),))}
    assert choose_cheapest(sharp, {}) == ("mc2", ())
    assert choose_cheapest({"fused_mc2": cheap, "mc2": cheap}, {}) == ("mc2", ("fused_mc2",))
    both = {"mc2": cheap, "alltoall": cheap}
    assert choose_cheapest(both, {"alltoall": "static"}) == ("alltoall", ("mc2",))
    assert choose_cheapest(both, {"alltoall": "exact"}) == ("mc2", ("alltoall",))
    monkeypatch.setattr("moe_lowering.passes.policy.price_of", lambda name, *rest: prices[name])
    where = deployment("mc2")
    refused = Verdict("alltoall", violations=(object(),))
    verdicts = {"alltoall": refused, **{name: Verdict(name, form=name) for name in prices}}
    chosen, reason = Policy().choose(verdicts, block_spec(block(), where, 8), where, 8)
    assert chosen == "allgather"
    assert reason == (
        "the simplest of those tied at 8 tokens: 100 +- 10 us; a tie with mc2 99 +- 10 us, as the difference of 1 us may be "
        "wrong by 14 us; against fused_mc2 500 +- 50 us"
    )
    _, reason = Policy().choose(verdicts | {"fused_mc2": refused}, block_spec(block(), where, 8), where, 8)
    assert reason.endswith(", as the difference of 1 us may be wrong by 14 us")
    prices["mc2"] = sharp["mc2"]  # the twin: without a tie it is the cheapest
    chosen, reason = Policy().choose(verdicts, block_spec(block(), where, 8), where, 8)
    assert (chosen, reason.partition(": ")[0]) == ("mc2", "cheapest at 8 tokens")


def test_one_legal_implementation_is_not_priced(monkeypatch):
    monkeypatch.setattr(work, "count_form", None)
    where = deployment("mc2", ep=4, hccl_buffer_mb=1)
    verdicts = {"allgather": Verdict("allgather", form="allgather")}
    violated = Verdict("mc2", violations=(object(),), form="mc2")
    verdicts |= dict.fromkeys(("alltoall", "mc2", "fused_mc2"), violated)
    chosen, reason = Policy().choose(verdicts, block_spec(block(hidden=640), where, 8), where, 8)
    assert (chosen, reason) == ("allgather", "the only legal one")
    verdicts["mc2"] = Verdict("mc2", form="mc2")
    with pytest.raises(TypeError):  # the twin: with two, something is counted
        Policy().choose(verdicts, block_spec(block(hidden=640), where, 8), where, 8)


def test_float32_layers_have_a_price():
    where = deployment("allgather")
    spec = block_spec(dataclasses.replace(block(), dtype=torch.float32), where, 64)
    assert (
        price_of("allgather", "allgather", spec, where, 64, rates_of("A3")).ns > price("allgather", "allgather", 64).ns
    )


# ------------------------------------------------------------------------------------------------ beside vllm-ascend's rule


@pytest.mark.parametrize("soc", ["A2", "A3"])
@pytest.mark.parametrize("quantisation", ["none", "w8a8"])
def test_where_the_choice_differs_from_vllm_ascends_the_report_says_why(soc, quantisation):
    said = set()
    layer = block(quantisation, hidden=7168, intermediate=2048, experts=256, top_k=8)
    for ep, tokens in itertools.product((8, 64), (1, 128, 4096)):
        where = deployment("exact", soc=soc, ep=ep, max_tokens=4096, hccl_buffer_mb=4096, weight_format="nz")
        answer = Question(layer, where, Policy()).at(tokens)
        beside = answer.beside_rule()
        assert beside.differs == (beside.selects != answer.choice) == bool(beside.why)
        said.add(beside.why.split(" ")[0] if beside.differs else "same")
        if beside.differs and answer.judgement.verdicts[beside.selects].legal:
            ours, theirs = answer.prices[answer.choice], answer.prices[beside.selects]
            assert ours.ns <= theirs.ns or is_tie(ours, theirs)
            assert ("are a tie" in beside.why) == is_tie(ours, theirs)
            assert is_tie(ours, theirs) or "dearer than" in beside.why
        elif beside.differs:
            assert "it is not legal here: [" in beside.why
    assert len(said) > 1


def test_a_rule_that_refuses_says_so():
    answer = Question(block(), deployment("mc2").replace(fused_mode=2), Policy()).at(8)
    beside = answer.beside_rule()
    assert beside.selects is None and beside.differs and "fused_mode is 2" in beside.why
    assert str(beside).startswith("vllm_ascend_main selects nothing: ")
