"""Routers in models' own operators: proven ones become the operator and stay right, others are left with their reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import reference
import torch
from router_forms import FOLLOWED, FORMS, TWINS
from router_graphs import arguments, expected, layer, logits_of, lower, trace
from torch.fx.experimental.proxy_tensor import make_fx

from moe_lowering import Deployment, MoeLowering, lowering_backend, route, simulator
from moe_lowering.passes.find_blocks import find_blocks
from moe_lowering.passes.graph.edit_log import ModuleEdits
from moe_lowering.passes.routers import lower_router, meaning
from moe_lowering.passes.routers.lower_router import find_routers
from moe_lowering.passes.routers.match_router import BY_LOGITS, TIES, readers_of
from moe_lowering.passes.routers.reports import GATING
from moe_lowering.passes.routers.values import Opaque
from moe_lowering.report.text import render

simulator.enable()
aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def operators(gm):
    return [node.target for node in gm.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_a_form_becomes_the_operator(name, dtype, ties):
    form, logits = FORMS[name], logits_of(dtype, ties)
    gm = trace(form.router, logits)
    (router,) = (report := lower(gm)).routers
    assert (router.was, router.became, router.reason) == ("aten", GATING, "proven equal")
    assert router.notes == ((TIES, BY_LOGITS) if form.router.__name__ == "top_k_first" else (TIES,))
    assert "router_forms.py" in router.line or not router.line
    assert report.to_json()["routers"] == [router.to_json()]
    left = {aten.topk.default, aten.max.dim, aten._softmax.default, aten.sigmoid.default, aten.scatter.value}
    assert torch.ops.npu.npu_moe_gating_top_k.default in operators(gm) and left.isdisjoint(operators(gm))
    y, weights, ids = gm(*arguments(logits))
    right, chosen = expected(form, logits)
    order = ids.argsort(-1), chosen.argsort(-1)
    assert torch.equal(ids.gather(-1, order[0]), chosen.long().gather(-1, order[1]))
    reference.assert_near(weights.gather(-1, order[0]), right.gather(-1, order[1]), weights.dtype)
    x, _, _, w13, w2 = arguments(logits)
    reference.assert_near(y, reference.moe(x, right, chosen, w13, w2), y.dtype) if weights.dtype == y.dtype else None


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_follows_the_weights_stays(name):
    """Another sum, a second factor, a factor of each expert: these stay, and read what the operator gives."""
    logits = logits_of()
    gm = trace(FOLLOWED[name], logits)
    (router,) = lower(gm).routers
    assert router.became == GATING
    pairs = list(zip(gm(*arguments(logits)), layer(FOLLOWED[name])(*arguments(logits)), strict=True))
    (new, old), orders = pairs[1], [ids.argsort(-1) for ids in pairs[2]]
    pairs[1] = new.gather(-1, orders[0]), old.gather(-1, orders[1])
    pairs[2] = tuple(ids.sort(-1).values for ids in pairs[2])
    for new, old in pairs:
        assert new.dtype == old.dtype
        torch.testing.assert_close(new, old, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_is_left(name):
    code, router = TWINS[name]
    logits = logits_of()
    gm = trace(router, logits)
    report = lower(gm)
    (found,) = report.routers
    assert found.became is None and found.reason.startswith(f"[{code}] at ") and "expected: " in found.reason
    assert torch.ops.npu.npu_moe_gating_top_k.default not in operators(gm)
    assert f"[{code}]" in " ".join(render(report).split()) and report.fully_lowered
    assert "<built-in" not in render(report) and "operator.getitem" not in render(report)
    new, old = gm(*arguments(logits)), layer(router)(*arguments(logits))
    assert all(torch.equal(a, b) for a, b in zip(new[1:], old[1:], strict=True))
    torch.testing.assert_close(new[0], old[0])


def test_the_reason_names_the_line_of_the_model():
    code, router = TWINS["biased_weights"]
    lowering = MoeLowering(Deployment(soc="A3"), "allgather")
    torch._dynamo.reset()
    torch.compile(layer(router), backend=lowering_backend(lowering), fullgraph=True)(*arguments(logits_of()))
    (found,) = lowering.reports[-1].routers
    assert f"[{code}] at aten." in found.reason and "router_forms.py:" in found.line
    assert found.says().count("router_forms.py:") == 1, "the place once"


@pytest.mark.parametrize("name", ["deepseek_v3", "top-k, softmax", "leading axes"])
def test_dynamic_tokens(name):
    form, lowering = FORMS[name], MoeLowering(Deployment(soc="A3"), "allgather", strict=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer(form.router), backend=lowering_backend(lowering), fullgraph=True, dynamic=True)
    for tokens in (10, 6, 14):
        logits = logits_of(torch.bfloat16, tokens=tokens)
        _, weights, ids = compiled(*arguments(logits))
        right, chosen = expected(form, logits)
        torch.testing.assert_close(weights.double().sort(-1).values, right.sort(-1).values, rtol=1e-2, atol=1e-3)
        assert torch.equal(ids.sort(-1).values, chosen.long().sort(-1).values)
    (report,) = lowering.reports
    assert [router.became for router in report.routers] == [GATING]


COMPARED = {
    "== 1": (torch.eq, 1, False),
    "!= 0": (torch.ne, 0, False),
    "== 0": (torch.eq, 0, True),
    "!= 1": (torch.ne, 1, True),
}


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("ones", [True, False], ids=["ones", "zeros"])
def test_a_constant_mask_that_is_compared(name, ones):
    """It drops all experts, which is no router, or none of them."""
    compare, number, drops_none_of_ones = COMPARED[name]

    def router(logits, bias):
        scores = logits.float().softmax(-1)
        mask = torch.ones_like(scores) if ones else torch.zeros_like(scores)
        ids = scores.masked_fill(compare(mask, number), 0.0).topk(4, -1)[1]
        return scores.gather(1, ids), ids

    (found,) = lower(trace(router, logits_of())).routers
    assert (found.became is not None) == (drops_none_of_ones == ones), found


def test_what_one_router_left_no_room_for_is_open_to_the_next(monkeypatch):
    """Nodes that are not understood for want of room are understood afterwards; the twin has room at once."""
    gm = trace(FORMS["deepseek_v3"].router, logits_of())
    last = next(node for node in reversed(gm.graph.nodes) if node.target is aten.gather.default)
    monkeypatch.setattr(meaning, "_NODES", 3)
    read = meaning.Meaning()
    assert isinstance(read.of(last), Opaque)
    monkeypatch.setattr(meaning, "_NODES", 160)
    read.start()
    assert not isinstance(read.of(last), Opaque)
    assert type(meaning.Meaning().of(last)) is type(read.of(last))


def test_a_write_in_place():
    """Scores that are written between the selection and the weights; the twin writes before anything reads them."""

    def written(logits, bias):
        scores = logits.float().sigmoid().add(0.0)
        ids = (scores + bias).topk(4, -1)[1]
        scores.mul_(2.0)
        return scores.gather(1, ids), ids

    def before(logits, bias):
        scaled = logits + 1
        scaled.mul_(2.0)
        weights, ids = scaled.softmax(-1).topk(4, -1)
        return weights, ids

    logits = logits_of()
    for router, code in ((written, "router."), (before, None)):
        gm = trace(router, logits, functional=False)
        (found,) = lower(gm).routers
        assert (found.became is None) == (code is not None), found
        new, old = gm(*arguments(logits)), layer(router)(*arguments(logits))
        torch.testing.assert_close(new[1], old[1])


def test_logits_that_are_written_later_are_left():
    def router(logits, bias):
        scores = logits.softmax(-1)
        weights, ids = scores.topk(4, -1)
        logits.mul_(0.5)
        return weights / weights.sum(-1, keepdim=True), ids

    gm = trace(router, logits_of(), functional=False)
    (found,) = lower(gm).routers
    assert found.became is None and found.reason.startswith("[router.written] at ")


@pytest.mark.parametrize(
    ("gathered", "alike", "became"), [(False, False, GATING), (True, True, GATING), (True, False, None)]
)
def test_two_blocks_of_one_router(gathered, alike, became):
    """One operator where both read what it gives, or what the values of the selection give; else left."""

    def compute(x, logits, bias, w13, w2):
        scores = logits.softmax(-1)
        weights, ids = scores.topk(4, -1)
        weights = scores.gather(1, ids) if gathered else weights
        other = weights if alike else weights / weights.sum(-1, keepdim=True)
        return sum(layer(lambda *_: (each, ids))(x, logits, bias, w13, w2)[0] for each in (weights, other))  # noqa: B023

    given = arguments(logits_of())
    gm = make_fx(compute, tracing_mode="fake")(*given)
    (found,) = lower(gm).routers
    assert found.became == became and (became or found.reason.startswith("[router.two_weights] at "))
    torch.testing.assert_close(gm(*given), compute(*given))


def test_what_the_operator_cannot_is_left_as_it_is():
    """Sigmoid without a division by the sum: the operator always divides. Nothing is composed anew."""

    def router(logits, bias):
        return logits.sigmoid().topk(4, -1)

    gm = trace(router, logits_of())
    (found,) = lower(gm).routers
    assert found.became is None and found.reason.startswith("[gating.")
    assert aten.topk.default in operators(gm)


def test_a_router_of_a_block_that_is_left_stays():
    gm = trace(FORMS["deepseek_v3"].router, logits_of())
    lowering = MoeLowering(Deployment(soc="A3"), "mc2")  # one rank: illegal
    lowering(gm)
    (found,) = lowering.reports[-1].routers
    assert found.became is None and found.reason.startswith("[router.block_left]")
    assert torch.ops.npu.npu_moe_gating_top_k.default not in operators(gm)


def test_operators_of_torch_npu_are_known():
    """A hand-written router is said to be one, with what follows it, and left."""

    def gating(logits, bias):
        return torch.ops.npu.npu_moe_gating_top_k(logits, 4, bias=bias, norm_type=1)[:2]

    def gating_softmax(logits, bias):
        weights, ids, _ = torch.ops.npu.npu_moe_gating_top_k_softmax(logits, None, 4)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20), ids

    for router, was, after in (
        (gating, GATING, ""),
        (gating_softmax, "npu.npu_moe_gating_top_k_softmax", ", its weights divided by their sum + 1e-20"),
    ):
        gm = trace(router, logits_of())
        before = operators(gm).count(getattr(torch.ops.npu, was.removeprefix("npu.")).default)
        (found,) = lower(gm).routers
        assert (found.was, found.became) == (was, was) and found.reason.startswith(
            f"[router.is_operator] a router's operator already{after};"
        )
        assert before == 1 == operators(gm).count(getattr(torch.ops.npu, was.removeprefix("npu.")).default)


def test_running_twice_changes_nothing():
    gm = trace(FORMS["deepseek_v3"].router, logits_of())
    lower(gm)
    code = gm.code
    assert lower(gm).routers == () and gm.code == code


@pytest.mark.parametrize(("groups", "became"), [(1, GATING), (16, "aten")])
def test_an_own_route_is_reported_too(groups, became):
    """With its epsilon in the operator, and in ATen operators where groups of two experts make that illegal."""

    def router(logits, bias):
        return route(logits, 4, epsilon=1e-3, scoring="sigmoid", num_groups=groups, topk_groups=groups)

    gm = trace(router, logits_of())
    (found,) = lower(gm).routers
    assert (found.was, found.became) == ("moe_lowering.route", became)
    assert ("gating.group_size" in found.reason) == (groups > 1)
    weights = gm(*arguments(logits_of()))[1]
    torch.testing.assert_close(weights, expected(FORMS["an epsilon that matters"], logits_of())[0].float())


def test_routers_can_be_reported_alone_or_not_at_all():
    gm = trace(FORMS["deepseek_v3"].router, logits_of())
    blocks, _, _ = find_blocks(gm.graph)
    routes, reports = find_routers(gm.graph, readers_of(blocks), raise_routers="report")
    assert routes == [] and [report.reason[:15] for report in reports] == ["[router.report]"]
    assert find_routers(gm.graph, readers_of(blocks), raise_routers="off") == ([], [])
    assert [route.spec.scoring for route in find_routers(gm.graph, readers_of(blocks))[0]] == ["sigmoid"]
    with pytest.raises(ValueError, match="raise_routers is 'on'; accepted: auto, report, off"):
        find_routers(gm.graph, readers_of(blocks), raise_routers="on")


def test_a_defect_leaves_the_graph_and_is_told(monkeypatch):
    def fail(*_):
        raise KeyError("on purpose")

    for place, code in (("match_routers", "[router.not_looked] internal error"), ("rewrite_router", "rewrite undone")):
        with monkeypatch.context() as patch:
            patch.setattr(lower_router, place, fail)
            gm = trace(FORMS["deepseek_v3"].router, logits_of())
            (found,) = lower(gm).routers
        assert found.became is None and found.reason.startswith(code) and "KeyError" in found.reason
        assert aten.topk.default in operators(gm)
        gm(*arguments(logits_of()))


def test_a_graph_that_is_put_back_has_its_router(monkeypatch):
    """Lint fails at the end: all edits are taken back, and the report says so of the router too."""
    gm = trace(FORMS["deepseek_v3"].router, logits_of())
    before = gm.code
    monkeypatch.setattr(ModuleEdits, "compile", lambda self: (_ for _ in ()).throw(RuntimeError("on purpose")))
    lowering = MoeLowering(Deployment(soc="A3"), "allgather")
    lowering(gm)
    (found,) = lowering.reports[-1].routers
    assert found.became is None and "on purpose" in found.reason and found.notes == ()
    assert gm.graph.python_code("self").src == before and aten.topk.default in operators(gm)


def test_codes_are_documented():
    """Every code of the modules is a row of docs/routers.md, and the reverse."""
    folder = Path(lower_router.__file__).parent
    code = re.compile(r"router\.(?!md|py)[a-z_]+")
    used = {each for path in folder.glob("*.py") for each in re.findall(r'"\[?(router\.[a-z_]+)', path.read_text())}
    told = set(code.findall((folder.parents[2] / "docs" / "routers.md").read_text()))
    assert used == told and len(used) > 20


def test_inputs_as_ids_have_no_router():
    gm = trace(lambda logits, bias: (bias.expand(8, -1)[:, :4], logits[:, :4].long()), logits_of(ties=True).abs())
    assert [found.became for found in lower(gm).routers] == [None]
