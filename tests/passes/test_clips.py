"""Generic layers whose activations are clipped: lowered where there is an operator for it, and right; refused elsewhere."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from reference import relative_error

from moe_lowering import Deployment, MoeLowering, lowering_backend
from moe_lowering.backends import cache_key
from moe_lowering.passes import legality
from moe_lowering.passes.implementations import quantised_mlp

HIDDEN, INNER, EXPERTS, TOP_K = 64, 32, 4, 2
ops = torch.ops.moe_lowering
CLIP = torch.linspace(0.3, 1.2, EXPERTS)


class Layer(torch.nn.Module):
    """Experts of int8 weights whose activations are clipped."""

    def __init__(self, clip: torch.Tensor | None = CLIP, **more: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        raw = [
            torch.randn(EXPERTS, n, k, generator=generator) / n**0.5 for n, k in ((HIDDEN, 2 * INNER), (INNER, HIDDEN))
        ]
        self.scales = [each.abs().amax(1) / 127 for each in raw]
        self.ints = [(each / s.unsqueeze(1)).round().to(torch.int8) for each, s in zip(raw, self.scales, strict=True)]
        self.clip, self.more = clip, more

    def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        rows, scale, counts, handle = ops.dispatch(x, None, ids, None, EXPERTS, "", 1, "", 1, 0, 0)
        given = {
            "activation": "swiglu",
            "limit": 0.0,
            "alpha": 1.0,
            "interleaved": False,
            "quantisation": "w8a8",
            **self.more,
        }
        out = ops.grouped_mlp(
            rows, scale, counts, self.ints[:1], self.ints[1:], [], [], w13_scale=self.scales[:1], w2_scale=self.scales[1:],
            h_clip=self.clip, **given,
        )  # fmt: skip
        return ops.combine(out, weights, ids, handle, None, EXPERTS, "", 1, "", 1, 0)

    def expected(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """In float64, token by token."""
        dense = [i.double() * s.double().unsqueeze(1) for i, s in zip(self.ints, self.scales, strict=True)]
        y = torch.zeros(len(x), HIDDEN, dtype=torch.float64)
        for token, chosen in enumerate(ids.tolist()):
            for choice, expert in enumerate(chosen):
                gate, up = (x[token].double() @ dense[0][expert]).chunk(2)
                hidden = gate / (1 + torch.exp(-gate)) * up
                if self.clip is not None:
                    most = hidden.abs().max() * self.clip[expert].double()
                    hidden = hidden.clamp(-most, most)
                y[token] += weights[token, choice].double() * (hidden @ dense[1][expert])
        return y


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.rand(9, EXPERTS, generator=generator).argsort(1)[:, :TOP_K].int()
    return torch.randn(9, HIDDEN, generator=generator).bfloat16(), torch.rand(9, TOP_K, generator=generator), ids


def lowered(layer: Layer, **fields: Any) -> tuple[torch.Tensor, Any]:
    lowering = MoeLowering(Deployment(**{"soc": "A3", "weight_format": "nz", **fields}))
    torch._dynamo.reset()
    with torch.no_grad():
        y = torch.compile(layer, backend=lowering_backend(lowering), fullgraph=True)(*inputs())
    (block,) = lowering.reports[0].blocks
    return y, block


def codes(block: Any) -> set[str]:
    """Of the rules that AllGather breaks."""
    return {violation.code for violation in block.verdicts["allgather"].violations}


def test_a_layer_is_lowered_to_the_operator_that_clips() -> None:
    y, block = lowered(layer := Layer())
    assert block.comm == "allgather" and "custom.npu_swiglu_clip_quant" in block.ops_after
    expected, unclipped = layer.expected(*inputs()), Layer(None).expected(*inputs())
    assert relative_error(y, expected) < 2e-2 < relative_error(y, unclipped), "the twin: clips count"


def test_without_clips_another_operator_is_taken() -> None:
    y, block = lowered(layer := Layer(None))
    assert "custom.npu_swiglu_clip_quant" not in block.ops_after
    assert relative_error(y, layer.expected(*inputs())) < 2e-2


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "another activation": ({"activation": "gelu"}, {}),
    "alternating columns": ({"interleaved": True}, {}),
    "smooth scales too": ({"h_smooth": torch.ones(EXPERTS, INNER)}, {}),
    "GE": ({}, {"mode": "ge"}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_operator_clips_is_left(case: str) -> None:
    words, fields = REFUSED[case]
    y, block = lowered(layer := Layer(**words), **fields)
    assert block.comm is None and "block.clip" in codes(block)
    torch.testing.assert_close(y, layer(*inputs()), rtol=0, atol=0)


def test_a_soc_that_the_operator_is_not_for_is_refused() -> None:
    _, block = lowered(Layer(), soc="A2")
    assert block.comm is None and "swiglu_clip_quant.soc" in codes(block)


def test_a_library_that_is_not_loaded_is_asked_for_and_may_come_later() -> None:
    layer = Layer()
    with (
        mock.patch.object(quantised_mlp, "loaded_libraries", frozenset),
        mock.patch.object(legality, "loaded_libraries", frozenset),
    ):
        y, block = lowered(layer)
    assert block.comm is None and "block.clip" in codes(block)
    torch.testing.assert_close(y, layer(*inputs()), rtol=0, atol=0)
    assert lowered(layer)[1].comm == "allgather"


def test_a_compile_cache_asks_which_libraries_are_loaded() -> None:
    """A graph that was left for want of one is not the graph of a process that has it."""
    lowering = MoeLowering(Deployment(soc="A3"))
    with_library = cache_key.cache_digest(lowering)
    assert with_library == cache_key.cache_digest(lowering)
    with mock.patch.object(cache_key, "loaded_libraries", frozenset):
        assert cache_key.cache_digest(lowering) != with_library
