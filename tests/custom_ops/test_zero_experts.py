"""``zero_experts`` of dispatch and combine: ids past the experts' that no row is sent for."""

from __future__ import annotations

import pytest
import torch
from reference import relative_error

from moe_lowering.custom_ops.dispatch_plan import FEW

OPS = torch.ops.moe_lowering
EXPERTS, ZEROS, HIDDEN, TOP_K = 6, 3, 8, 3
GROUP = (EXPERTS, "", 1, "", 1, 0)


def inputs(tokens):
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, EXPERTS + ZEROS, generator=generator).argsort(-1)[:, :TOP_K].int()
    ids[0] = torch.arange(EXPERTS, EXPERTS + ZEROS)  # a token without any row
    return torch.randn(tokens, HIDDEN, generator=generator), ids, torch.rand(tokens, TOP_K, generator=generator)


def layer(x, ids, weights, mask=None, zeros=ZEROS):
    """Expert e multiplies its rows by e + 1."""
    rows, _, counts, handle = OPS.dispatch(x, None, ids, mask, *GROUP, 0, zero_experts=zeros)
    factor = torch.arange(1.0, EXPERTS + 1).repeat_interleave(counts)
    rows = torch.cat([rows[: len(factor)] * factor.unsqueeze(1), rows[len(factor) :]])
    return OPS.combine(rows, weights, ids, handle, mask, *GROUP, zero_experts=zeros), counts


@pytest.mark.parametrize("tokens", [1, 4, FEW // TOP_K + 5])  # few slots are sorted in Python
@pytest.mark.parametrize("masked", [False, True])
def test_they_give_nothing(tokens, masked):
    x, ids, weights = inputs(tokens)
    mask = torch.arange(tokens) % 3 != 2 if masked else None
    y, counts = layer(x, ids, weights, mask)
    expected = torch.zeros(tokens, HIDDEN, dtype=torch.float64)
    chosen = [0] * EXPERTS
    for token, row in enumerate(ids.tolist()):
        for choice, expert in enumerate(row):
            if expert < EXPERTS and (mask is None or mask[token]):
                chosen[expert] += 1
                expected[token] += weights[token, choice].double() * (expert + 1) * x[token].double()
    assert counts.tolist() == chosen
    assert relative_error(y, expected) < 1e-6 if any(chosen) else not y.any()


def test_an_id_past_them_or_twice_is_refused():
    x, ids, weights = inputs(4)
    for wrong, words in ((EXPERTS + ZEROS, "accepted: 0 to 8"), (int(ids[1, 0]), "twice for token 1")):
        changed = ids.clone()
        changed[1, 1] = wrong
        with pytest.raises(ValueError, match=words):
            layer(x, changed, weights)
    with pytest.raises(ValueError, match=r"ids has 8 for token .*accepted: 0 to 5"):
        layer(x, ids, weights, zeros=0)
    with pytest.raises(ValueError, match="zero_experts is -1; accepted: 0 or more"):
        layer(x, ids, weights, zeros=-1)


def test_a_combine_that_knows_none_is_refused():
    x, ids, weights = inputs(4)
    rows, _, _, handle = OPS.dispatch(x, None, ids, None, *GROUP, 0, zero_experts=ZEROS)
    with pytest.raises(ValueError, match="ask for 12; accepted: the handle that dispatch made"):
        OPS.combine(rows, weights, ids, handle, None, *GROUP)


def test_opcheck():
    x, ids, weights = inputs(4)
    torch.library.opcheck(OPS.dispatch.default, (x, None, ids, None, *GROUP, 0), {"zero_experts": ZEROS})
    rows, _, _, handle = OPS.dispatch(x, None, ids, None, *GROUP, 0, zero_experts=ZEROS)
    torch.library.opcheck(OPS.combine.default, (rows, weights, ids, handle, None, *GROUP), {"zero_experts": ZEROS})


def test_more_choices_than_experts():
    ids = torch.arange(EXPERTS + 2, dtype=torch.int32).unsqueeze(0)
    y, counts = layer(torch.ones(1, HIDDEN), ids, torch.ones(1, EXPERTS + 2))
    assert counts.tolist() == [1] * EXPERTS and y.tolist() == [[21.0] * HIDDEN]
    with pytest.raises(ValueError, match=r"accepted: \[..., k\], k from 1 to 6"):
        layer(torch.ones(1, HIDDEN), ids, torch.ones(1, EXPERTS + 2), zeros=0)


def test_not_with_shared_expert_ranks():
    x, ids, _ = inputs(4)
    with pytest.raises(ValueError, match="zero_experts is 3; accepted: 0 with shared_expert_ranks 1"):
        OPS.dispatch.default(x, None, ids, None, EXPERTS, "g", 2, "", 1, 0, 0, 1, 1, False, None, ZEROS)
