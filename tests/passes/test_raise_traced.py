"""Graphs that torch.export and make_fx gave, functionalised or not, decomposed or not: forms are raised from all of them."""

from __future__ import annotations

import pytest
import reference
import torch
import torch.nn.functional as F
from foreign_forms import (
    APART,
    BIASES,
    EXPERTS,
    FLOAT,
    FORMS,
    INTERMEDIATE,
    KN,
    TOP_K,
    Foreign,
    apart,
    back,
    halves,
    kn,
    offsets,
    order,
    product,
)
from raise_graphs import lower, run
from trace_ways import WAYS, trace_by

# Each form in the graph of plain export, which has most of what others take away, and in one of the others
EACH = [(form, way) for at, form in enumerate(FORMS) for way in ("export", [*WAYS][1:][at % (len(WAYS) - 1)])]
# Which make_fx of tensors refuses to trace
READS_NUMBERS = (
    "counted by one_hot",
    "counted by one_hot of two dimensions",
)


@pytest.mark.parametrize(("form", "way"), [(f, w) for f, w in EACH if w != "make_fx" or f not in READS_NUMBERS])
def test_each_form_is_raised(form, way):
    layer = FORMS[form]
    made = layer.make()
    gm = trace_by(way, layer.function, made)
    (block,) = lower(gm, strict=True).blocks
    assert (block.comm, block.raised_from) == ("allgather", layer.form), block.reason
    reference.assert_near(run(gm, made), layer.reference(made), layer.dtype)


def test_each_way_is_tried():
    assert {way for _, way in EACH} == WAYS.keys()


def unchanged(value, *_):
    return value


def written(between=unchanged, rows=unchanged, bias=unchanged, way=back, after=unchanged, count=offsets):
    """A layer with a bias that is added in place, and pieces of it that a twin has otherwise."""

    def forward(x, weights, ids, **t):
        sorted_ids, perm = order(ids)
        offs = count(sorted_ids)
        h = product(rows(x[perm // TOP_K], x), t["w13"], offs)
        kept = between(h)
        h = h.add_(bias(t["w13_bias"][sorted_ids]))
        y = product(halves(h), t["w2"], offs).add_(t["w2_bias"][sorted_ids])
        y = y.mul_(weights.reshape(-1)[perm].unsqueeze(-1))
        result = way(after(y, h), perm, ids)
        return result if kept is h else (result, kept)

    return forward


def first_columns(h):
    h[:, : h.shape[1] // 2].mul_(2.0)
    return h


def x_is_written(rows, x):
    x.mul_(2.0)
    return rows


def added_in_place(rows, perm, ids):
    return torch.zeros(len(ids), rows.shape[1]).index_add_(0, perm // TOP_K, rows)


def read_through_a_view(rows, perm, ids):
    lines = torch.zeros_like(rows)
    lines[perm] = rows
    by_token = lines.view(*ids.shape, -1)
    lines.mul_(2.0)
    return by_token.sum(1)


RIGHT = {
    "plain": {},
    "added in place": {"way": added_in_place},
}
TWINS = {
    "a view is read later": ({"between": lambda h: h.view(-1)}, "raise.operation"),
    "half of it is read later": ({"between": lambda h: h[: len(h) // 2]}, "raise.operation"),
    "half of it is written": ({"between": first_columns}, "raise."),
    "an input is written": ({"rows": x_is_written}, "raise."),
    "another dtype is added": ({"bias": torch.Tensor.double}, "raise.operation"),
    "written after a view": ({"way": read_through_a_view}, "raise."),
    "counted twice": (
        {"count": lambda ids: torch.zeros(EXPERTS).index_add_(0, ids, torch.ones(len(ids)), alpha=2).cumsum(0).int()},
        "raise.offsets",
    ),
    "twos are counted": (
        {
            "count": lambda ids: (
                torch.zeros(EXPERTS).index_put_([ids], torch.full([len(ids)], 2.0), True).cumsum(0).int()
            )
        },
        "raise.offsets",
    ),
}
BIASED = KN | BIASES


@pytest.mark.parametrize("pieces", RIGHT)
def test_a_write_into_memory_of_its_own_is_its_functional_form(pieces):
    layer = Foreign("grouped_mm", written(**RIGHT[pieces]), BIASED, kn(), FLOAT)
    made = layer.make()
    gm = trace_by("export", layer.function, made)
    (block,) = lower(gm, strict=True).blocks
    assert block.raised_from == layer.form, block.reason
    y = run(gm, made)
    reference.assert_near(y[0] if isinstance(y, tuple) else y, layer.reference(made), FLOAT)


@pytest.mark.parametrize("twin", TWINS)
def test_a_write_that_somebody_sees_is_not(twin):
    pieces, code = TWINS[twin]
    layer = Foreign("grouped_mm", written(**pieces), BIASED, kn(), FLOAT)
    gm, expected = (trace_by("export", layer.function, layer.make()) for _ in range(2))
    report = lower(gm)
    assert not report.blocks
    assert all(found.not_raised.code.startswith(code) for found in report.foreign), report.foreign
    torch.testing.assert_close(run(gm, layer.make()), run(expected, layer.make()), rtol=0, atol=0)


def test_tokens_that_are_written_after_their_rows_were_taken():
    def forward(x, weights, ids, **t):
        own = x * 1.0
        sorted_ids, perm = order(ids)
        y = product(halves(product(own[perm // TOP_K], t["w13"], offsets(sorted_ids))), t["w2"], offsets(sorted_ids))
        own.mul_(2.0)
        return back(y * weights.reshape(-1)[perm].unsqueeze(-1), perm, ids) + own.mean()

    layer = Foreign("grouped_mm", forward, KN, kn(), FLOAT)
    made = layer.make()
    gm = trace_by("export", forward, made)
    expected = run(gm, made)
    (found,) = {found.not_raised.code for found in lower(gm).foreign}
    assert found == "raise.written_between"
    torch.testing.assert_close(run(gm, made), expected, rtol=0, atol=0)


@pytest.mark.parametrize("halved", [torch.ops.aten.slice.Tensor, torch.ops.aten.slice_copy.Tensor])
def test_gate_and_up_that_are_halves_of_one_tensor(halved):
    """Views of it are it as it is; copies as it was before it was written, which is before the layer."""

    def forward(x, weights, ids, **t):
        stored = t["w13"] * 1.0
        gate, up = halved(stored, 2, 0, INTERMEDIATE), halved(stored, 2, INTERMEDIATE, 2 * INTERMEDIATE)
        stored.mul_(2.0)
        sorted_ids, perm = order(ids)
        offs, rows = offsets(sorted_ids), x[perm // TOP_K]
        y = product(torch.nn.functional.silu(product(rows, gate, offs)) * product(rows, up, offs), t["w2"], offs)
        return back(y * weights.reshape(-1)[perm].unsqueeze(-1), perm, ids) + stored.mean()

    made = Foreign("grouped_mm", forward, KN, kn(), FLOAT).make()
    gm = trace_by("export", forward, made)
    expected = run(gm, made)
    (block,) = lower(gm).blocks
    joined = [node for node in gm.graph.nodes if node.target is torch.ops.aten.cat.default]
    assert block.comm == "allgather" and bool(joined) == (halved is torch.ops.aten.slice_copy.Tensor)
    torch.testing.assert_close(run(gm, made), expected, rtol=1e-5, atol=1e-5)


def routed(keep_values):
    """Mixtral's router, whose weights are divided in place, in front of a layer."""

    def forward(x, weights, ids, **t):
        values, chosen = torch.topk(F.softmax(x[:, :EXPERTS], dim=-1), TOP_K, dim=-1)
        kept = values[:1] if keep_values else None
        values /= values.sum(dim=-1, keepdim=True)
        y = FORMS["index_add"].function(x=x, weights=values, ids=chosen, **t)
        return (y, kept) if keep_values else y

    return forward


@pytest.mark.parametrize("keep_values", [False, True])
def test_a_router_that_divides_in_place(keep_values):
    made = FORMS["index_add"].make()
    gm, other = (trace_by("export", routed(keep_values), made) for _ in range(2))
    report = lower(gm)
    assert [block.comm for block in report.blocks] == ["allgather"]
    (router,) = report.routers
    assert (router.became is None) == keep_values, router
    y, expected = (torch.utils._pytree.tree_leaves(run(each, made)) for each in (gm, other))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def contracted(**equations):
    """gpt-fast's layer, with some of its equations otherwise."""
    named = {"first": "ti,taoi->tao", "second": "tao,taio->tai", "back": "tai,ta->ti"} | equations

    def forward(x, weights, ids, **t):
        x1, x3 = (torch.einsum(named["first"], x, t[name][ids]) for name in ("w1", "w3"))
        y = torch.einsum(named["second"], F.silu(x1) * x3, t["w2"][ids])
        return torch.einsum(named["back"], y, weights)

    return forward


EQUATIONS = {
    "letters": {"first": "xd,xkhd->xkh", "second": "bkh,bkdh->bkd"},
    "spaces": {"back": " tai , ta -> ti"},
}
OTHER_EQUATIONS = {
    "no arrow": {"back": "tai,ta"},
    "added up": {"first": "ti,taoi->ta", "second": "ta,taio->tai"},
    "weights of other tokens": {"back": "tai,sa->ti"},
    "dots": {"back": "...ai,...a->...i"},
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_equations_of_einsum_are_read(name):
    layer = Foreign("gathered_weights", contracted(**EQUATIONS[name]), APART, apart, FLOAT)
    made = layer.make()
    gm = trace_by("export", layer.function, made)
    (block,) = lower(gm, strict=True).blocks
    assert block.raised_from == layer.form, block.reason
    reference.assert_near(run(gm, made), layer.reference(made), FLOAT)


@pytest.mark.parametrize("name", OTHER_EQUATIONS)
def test_other_equations_are_left(name):
    layer = Foreign("gathered_weights", contracted(**OTHER_EQUATIONS[name]), APART, apart, FLOAT)
    made = layer.make()
    gm = trace_by("export", layer.function, made)
    expected = run(gm, made)
    assert not lower(gm).blocks
    torch.testing.assert_close(run(gm, made), expected, rtol=0, atol=0)


def test_tokens_one_after_the_other_are_not_each_token_several_times():
    def forward(x, weights, ids, **t):
        rows, flat = x.repeat(TOP_K, 1), ids.reshape(-1)
        y = torch.matmul(halves(torch.matmul(rows.unsqueeze(1), t["w13"][flat])), t["w2"][flat]).squeeze(1)
        return (y * weights.reshape(-1, 1)).view(*ids.shape, -1).sum(1)

    layer = Foreign("gathered_weights", forward, KN, kn(), FLOAT)
    made = layer.make()
    gm = trace_by("export", layer.function, made)
    expected = run(gm, made)
    report = lower(gm)
    assert not report.blocks and {found.not_raised.code for found in report.foreign} == {"raise.rows"}
    torch.testing.assert_close(run(gm, made), expected, rtol=0, atol=0)
