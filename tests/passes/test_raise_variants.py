"""Expert layers spelled in other ways than the forms of ``foreign_forms``: raised and right, or refused with a code; never wrong.

One piece after the other is spelled in each way, and ``MOE_LOWERING_VARIANTS`` layers have all pieces drawn at random.
"""

from __future__ import annotations

import logging
import os
import random

import foreign_gathered_variants as gathered
import foreign_variants as variants
import pytest
import torch
from foreign_forms import EXPERTS, FLOAT, NK, Foreign, halves, nk, product
from foreign_routers import compose_module
from raise_graphs import lines, lower, run, trace
from reference import relative_error

COUNT = int(os.environ.get("MOE_LOWERING_VARIANTS", "24"))
BOUND = 4e-6  # float32: the spelled layer rounds, and the lowered one
MAKERS = {
    "grouped": (variants.compose, variants.PIECES),
    "gathered": (gathered.compose_gathered, gathered.GATHERED_PIECES),
}
# What is refused, by its code: spellings that the rules do not know, or that mean another layer.
REFUSED = {
    ("grouped", "choice", "along the first axis"): "raise.offsets",
    ("gathered", "choice", "along the first axis"): "raise.sum",
    ("grouped", "order", "argsort of floats"): "raise.offsets",
    ("grouped", "order", "lowest of topk"): "raise.offsets",
    ("grouped", "ends", "searchsorted, the next"): "raise.offsets",
    ("grouped", "ends", "compared, at most"): "raise.offsets",
    ("grouped", "ends", "bucketize"): "raise.offsets",
    ("grouped", "ends", "a leading zero"): "raise.offsets",
    ("grouped", "rows", "tokens by take"): "raise.rows",
    ("grouped", "scale", "take"): "raise.weights",
    ("grouped", "scale", "by token"): "raise.weights",
    ("grouped", "back", "added one by one"): "raise.operation",
    ("grouped", "back", "mean"): "raise.operation",
    ("grouped", "where", "first rows"): "raise.weigh_input",
    ("gathered", "rows", "stacked"): "raise.rows",
    ("gathered", "rows", "looked up"): "raise.rows",
    ("gathered", "first", "sum"): "foreign.gathered_weights",
    ("gathered", "first", "baddbmm"): "foreign.gathered_weights",
    ("gathered", "second", "sum"): "foreign.gathered_weights",
    ("gathered", "second", "baddbmm"): "foreign.gathered_weights",
    **{(maker, "halves", how): "raise.operation" for maker in MAKERS for how in ("unflatten", "view")},
    **{(maker, "gate", how): "raise.operation" for maker in MAKERS for how in ("addcmul", "exp")},
    **{(maker, "gate", "tanh"): "raise.activation" for maker in MAKERS},
}
PLAIN = {"weights": "joined", "back": "second argsort", "weighed": "multiplied"}


@pytest.fixture(autouse=True)
def quiet():
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def outcome(layer: Foreign, dynamic: bool = False) -> tuple[str, float]:
    """(code of the reason, or "" where it is raised; how far the result is from that of the layer as it is written)."""
    made = layer.make()
    gm = trace(layer.function, made, dynamic)
    before, written = lines(gm), run(gm, made)
    report = lower(gm)
    error = relative_error(run(gm, made), written.double())
    if any(block.comm for block in report.blocks):
        return "", error
    assert not report.blocks and lines(gm) == before and report.foreign, report.blocks
    (found,) = report.foreign
    return found.code if found.not_raised is None else found.not_raised.code, error


def spelled() -> list[tuple[str, str, str]]:
    return [
        (maker, piece, how) for maker, (_, pieces) in MAKERS.items() for piece, table in pieces.items() for how in table
    ]


@pytest.mark.parametrize(("maker", "piece", "how"), spelled())
def test_a_piece_spelled_in_another_way(maker: str, piece: str, how: str):
    compose, pieces = MAKERS[maker]
    plain = {name: PLAIN.get(name, next(iter(table))) for name, table in pieces.items()}
    where = {"where": "back"} if piece == "weighed" else {}
    layer, chosen = compose(random.Random(0), **{**plain, **where, piece: how})
    code, error = outcome(layer)
    assert code == REFUSED.get((maker, piece, how), "") and error <= BOUND, chosen
    if not code:
        made = layer.make()
        after = variants.AFTERWARDS.get(chosen["after"], lambda x, y, shared: y)
        expected = after(made["x"].double(), layer.reference(made), made["shared"].double())
        assert relative_error(layer.function(**made), expected) <= BOUND


def test_layers_of_pieces_drawn_at_random():
    codes = []
    for seed in range(COUNT):
        draw = random.Random(seed)
        layer, chosen = MAKERS[draw.choice([*MAKERS])][0](draw)
        code, error = outcome(layer, dynamic=draw.random() < 0.3)
        assert error <= BOUND, (seed, chosen)
        codes.append(code)
    assert "" in codes and any(code.startswith("raise.") for code in codes), codes


def test_layers_with_routers_of_pieces_drawn_at_random():
    """One piece of a router may be twisted: then the router is left, or the layer, or both are lowered as what they are."""
    raised = []
    for seed in range(COUNT // 4):
        draw = random.Random(f"router {seed}")
        function, made, chosen = compose_module(draw)
        gm = trace(function, made, dynamic=draw.random() < 0.3)
        before, written = lines(gm), function(**made)
        report = lower(gm)
        assert relative_error(run(gm, made), written.double()) <= 5 * BOUND, (seed, chosen)
        raised.append(bool(report.blocks))
        assert raised[-1] or (report.foreign and lines(gm) == before), (seed, chosen)
    assert {*raised} == {True, False}


def test_weights_in_front_of_a_product_do_not_reach_its_biases():
    plain = {name: PLAIN.get(name, next(iter(table))) for name, table in variants.PIECES.items()}
    layer, _ = variants.compose(random.Random(0), **{**plain, "where": "activation", "weights": "biased"})
    assert outcome(layer)[0] == "raise.weights"


NUMBERS = {  # numbers of tokens, or of some experts, where those of slots or of all experts belong
    "places from numbers of tokens": {"back": lambda y, perm, ids: y[variants.stored(perm, variants.tokens_of(ids))]},
    "places from numbers of expanded tokens": {
        "back": lambda y, perm, ids: y[
            variants.stored(perm, torch.arange(6)[:, None].expand(-1, ids.shape[1]).reshape(-1))
        ]
    },
    "places from moved numbers": {"back": lambda y, perm, ids: y[variants.stored(perm, torch.arange(len(perm))[perm])]},
    "each number twice": {
        "ends": lambda ids: (ids.view(-1, 1) == torch.arange(EXPERTS // 2).repeat_interleave(2)).sum(0).cumsum(0).int()
    },
    "numbers over and over": {
        "ends": lambda ids: (
            (ids.view(-1, 1) == torch.arange(EXPERTS // 2).expand(2, EXPERTS // 2).reshape(-1)).sum(0).cumsum(0).int()
        )
    },
    "ones at the experts of one choice": {
        "ends": lambda ids: ids.new_zeros((len(ids), EXPERTS)).scatter(1, ids[:, :1], 1).sum(0).cumsum(0).int()
    },
    "twos at the experts": {
        "ends": lambda ids: ids.new_zeros((len(ids), EXPERTS)).scatter(1, ids, 2).sum(0).cumsum(0).int()
    },
    "ones on ones": {"ends": lambda ids: ids.new_ones((len(ids), EXPERTS)).scatter(1, ids, 1).sum(0).cumsum(0).int()},
    "searched from the left": {
        "ends": lambda ids: torch.searchsorted(torch.sort(ids.view(-1))[0], torch.arange(EXPERTS)).int()
    },
    "searched among other ids": {
        "ends": lambda ids: torch.searchsorted(
            torch.sort(ids.view(-1) // 2)[0], torch.arange(EXPERTS), right=True
        ).int()
    },
    "added to ones": {"back": lambda y, perm, ids: torch.ones_like(y).index_add(0, perm, y)},
    "the largest": {
        "back": lambda y, perm, ids: torch.zeros_like(y).scatter_reduce(0, perm[:, None].expand_as(y), y, "amax")
    },
    "twice what is added": {"back": lambda y, perm, ids: torch.zeros_like(y).index_add(0, perm, y, alpha=2)},
    "added to half of the columns": {
        "back": lambda y, perm, ids: torch.zeros_like(y).scatter_add(0, perm[:, None].expand(-1, y.shape[1] // 2), y)
    },
    "in place of what was there": {
        "back": lambda y, perm, ids: torch.ones(len(ids), y.shape[1]).scatter_reduce(
            0, (perm // ids.shape[1])[:, None].expand_as(y), y, "sum", include_self=False
        ),
        "way": lambda rows, ids: rows,
    },
    "the mean": {
        "back": lambda y, perm, ids: torch.ones_like(y).scatter_reduce(0, perm[:, None].expand_as(y), y, "mean")
    },
}


def sorted_layer(changes, way=lambda rows, ids: rows.view(*ids.shape, -1).sum(1)):
    def forward(x, weights, ids, **t):
        _, perm = torch.sort(ids.reshape(-1))
        offs = changes["ends"](ids) if "ends" in changes else variants.ENDS["histc"](ids, ids.view(-1))
        h = halves(product(x[perm // ids.shape[1]], t["w13"].transpose(-2, -1), offs))
        y = product(h, t["w2"].transpose(-2, -1), offs) * weights.view(-1)[perm].unsqueeze(-1)
        return way(changes["back"](y, perm, ids) if "back" in changes else y[perm.argsort()], ids)

    return Foreign("", forward, NK, nk(), FLOAT)


@pytest.mark.parametrize("twin", NUMBERS)
def test_other_numbers_are_not_taken_for_those_of_slots_or_experts(twin: str):
    changes = dict(NUMBERS[twin])
    way = {"way": changes.pop("way")} if "way" in changes else {}
    code, error = outcome(sorted_layer(changes, **way))
    assert code.startswith("raise.") and error == 0


def test_a_result_with_another_number_of_lines():
    """Six tokens are written where the number of tokens is a symbol: no layer of all of them."""
    six = {"back": lambda y, perm, ids: torch.zeros(6, 16).scatter_add(0, (perm // 2)[:, None].expand_as(y), y)}
    layer = sorted_layer(six, lambda rows, ids: rows)
    assert outcome(layer, dynamic=True)[0] == "raise.shape" and outcome(layer)[0] == ""
