"""What activations and weight formats owe: kernels, emitters and references that agree in numbers, and their meaning in docs.

As ``test_obligations.py``: a test that fails names the step of docs/adding.md that was left out.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import pytest
from checklists import RECORD, bullet, forgotten, page, require_words

from moe_lowering.vocabulary import ACTIVATIONS, EXPERT_FORMATS, SOCS

ACTIVATION, FORMAT = "An activation", "A weight format"
FORMATS = tuple(name for name, form in EXPERT_FORMATS.items() if form.quantised)


@functools.cache
def a_block() -> Any:
    """The record of a block on one rank, of which tests change a field."""
    from graph_build import build

    from moe_lowering.passes.find_blocks import find_blocks

    (block,), _, _ = find_blocks(build(one_rank()).gm.graph)
    return block.spec


def one_rank(**fields: Any) -> Any:
    """A graph of one block on one rank, of sizes that every chain of operators takes."""
    import torch
    from graph_cases import BlockCase, GraphCase

    from moe_lowering import Deployment

    deployment = Deployment(weight_format="nz", max_tokens=16)
    return GraphCase(deployment, (BlockCase(4, 2, 256, **fields),), (9,), hidden=256, dtype=torch.bfloat16)


# --- activations ------------------------------------------------------------------------------------------------------

LIMIT, ALPHA = 0.7, 1.3  # of activations that have one; not the defaults
GATES = [(word, interleaved) for word, made in ACTIVATIONS.items() for interleaved in (False, True)
         if getattr(made, "gated", True) or not interleaved]  # fmt: skip


def arguments(word: str) -> tuple[str, float, float]:
    return word, LIMIT if ACTIVATIONS[word].clamped else 0.0, ALPHA


def some_hidden(word: str) -> Any:
    """Rows [7, 2I], or [7, I] without a gate, on both sides of every clamp."""
    import torch

    width = 12 if getattr(ACTIVATIONS[word], "gated", True) else 6
    return torch.randn(7, width, generator=torch.Generator().manual_seed(3)) * 2


def expected(word: str, interleaved: bool) -> Any:
    import reference
    import torch

    try:
        rows = [reference.gated(row.double(), *arguments(word), interleaved) for row in some_hidden(word)]
    except ValueError as error:
        raise AssertionError(forgotten(ACTIVATION, "tests/helpers/reference.py", error)) from error
    return torch.stack(rows)


def test_activation_has_a_record() -> None:
    from moe_lowering.passes.implementations import activation

    require_words(ACTIVATION, "moe_lowering/passes/implementations/activation.py", activation.EMITTED, ACTIVATIONS)


@pytest.mark.parametrize("word", ACTIVATIONS)
def test_activation_has_a_reference(word: str) -> None:
    """Which knows the word, and computes something else than for any other word."""
    import torch

    own = expected(word, False)
    for other in ACTIVATIONS:
        if other != word and some_hidden(other).shape == some_hidden(word).shape:
            assert not torch.allclose(own, expected(other, False), atol=1e-6), (word, other)


@pytest.mark.parametrize(("word", "interleaved"), GATES)
def test_activation_is_computed(word: str, interleaved: bool) -> None:
    import torch

    from moe_lowering.custom_ops import grouped_mlp

    try:
        result = grouped_mlp.activate(some_hidden(word), *arguments(word), interleaved, torch.float32)
    except ValueError as error:
        raise AssertionError(forgotten(ACTIVATION, "moe_lowering/custom_ops/grouped_mlp.py", error)) from error
    torch.testing.assert_close(result.double(), expected(word, interleaved), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("soc", SOCS)
@pytest.mark.parametrize(("word", "interleaved"), GATES)
def test_activation_is_emitted(word: str, interleaved: bool, soc: str) -> None:
    """What is emitted on a SoC, run here: where no device operator has the activation, what it is composed of."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx import Graph, GraphModule

    from moe_lowering.passes.emission.emitter import Emitter
    from moe_lowering.passes.implementations import activation

    if word not in activation.EMITTED:
        pytest.fail(forgotten(ACTIVATION, "moe_lowering/passes/implementations/activation.py"))
    hidden, (_, limit, alpha) = some_hidden(word), arguments(word)
    fields = {"activation": word, "limit": limit, "alpha": alpha, "interleaved": interleaved, "intermediate": 6}
    mode, graph = FakeTensorMode(), Graph()
    node = graph.placeholder("hidden")
    node.meta["val"] = mode.from_tensor(hidden)
    counts, every_row = graph.placeholder("counts"), torch.tensor([hidden.shape[0]])
    counts.meta["val"] = mode.from_tensor(every_row)
    end = graph.output(None)
    emit = Emitter(graph, mode)
    with emit.at(end, node):
        y = activation.emit_activation(emit, node, counts, dataclasses.replace(a_block(), **fields), soc)
    end.args = (y,)
    result = GraphModule(torch.nn.Module(), graph)(hidden, every_row)
    torch.testing.assert_close(result.double(), expected(word, interleaved), rtol=1e-5, atol=1e-6)


def test_activation_is_documented() -> None:
    meanings = bullet("docs/architecture.md", "activation")
    told = {word for word in re.findall(r"`(\w+)`", meanings) if word != "interleaved"}
    require_words(ACTIVATION, "docs/architecture.md", told, ACTIVATIONS)


# --- weight formats ---------------------------------------------------------------------------------------------------


@functools.cache
def drawn(format: str) -> Any:
    """(the graph of a block with such experts, its inputs) on one rank; weights are drawn, not quantised."""
    from graph_build import build
    from graph_data import Data

    case = one_rank(quantisation=format)
    return build(case), Data(case)


def noise(built: Any, data: Any) -> float:
    """Signal-to-noise of y against float64 with the weights that were drawn, in dB."""
    import torch
    from quantised_numbers import snr

    with torch.no_grad():
        outputs = built.gm(*data.inputs(built))
    values = dict(zip(built.outputs, outputs, strict=True))
    return float(snr(values["y0"], data.expected(0, values["x0"])))


@pytest.mark.parametrize("format", FORMATS)
def test_format_has_a_record(format: str) -> None:
    """Tables of words know no others; and floats become such a weight, and come back to within a step of it."""
    import torch

    from moe_lowering.custom_ops import grouped_mlp, npu_grouped_mlp
    from moe_lowering.passes.implementations import quantised_mlp
    from moe_lowering.quantisation import dequantise, quantise_weight

    for words in (grouped_mlp._COMPUTED, npu_grouped_mlp._COMPUTED, {"none", *quantised_mlp.EMITTED}):
        assert words <= EXPERT_FORMATS.keys(), forgotten(FORMAT, RECORD, words - EXPERT_FORMATS.keys())
    w = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    step = (w.float().amax(1, keepdim=True) - w.float().amin(1, keepdim=True)) / (2 ** EXPERT_FORMATS[format].bits - 2)
    made = quantise_weight(w, format)
    assert ((dequantise(made) - w.float()).abs() <= 1.1 * step).all()


@pytest.mark.parametrize("format", EXPERT_FORMATS)
def test_format_is_computed(format: str) -> None:
    from moe_lowering.custom_ops import grouped_mlp

    if format not in grouped_mlp._COMPUTED:
        pytest.fail(forgotten(FORMAT, "moe_lowering/custom_ops/grouped_mlp.py"))
    assert noise(*drawn(format)) >= EXPERT_FORMATS[format].snr_floor


@pytest.mark.parametrize("format", EXPERT_FORMATS)
def test_format_is_computed_on_a_device(format: str) -> None:
    """The operators that a graph takes which was not lowered, with the simulator's kernels, beside the CPU kernel."""
    import torch
    from quantised_numbers import snr

    from moe_lowering.custom_ops import npu_grouped_mlp
    from moe_lowering.custom_ops.grouped_mlp import GroupedMlpCall

    if format not in npu_grouped_mlp._COMPUTED:
        pytest.fail(forgotten(FORMAT, "moe_lowering/custom_ops/npu_grouped_mlp.py"))
    _, data = drawn(format)
    given, w13, w2, _, _ = data.experts(0)
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(5)).bfloat16()
    counts, empty = torch.tensor([3, 0, 4, 1]), torch.empty(0)
    extras = {f"{name}_{part}": [given[f"{name}_{part}"]] if f"{name}_{part}" in given else None
              for name in ("w13", "w2") for part in ("scale", "offset", "scale_bias")}  # fmt: skip
    gate = ("swiglu", 0.0, 1.702, False)
    call: Any = GroupedMlpCall(x, empty, counts, [given["w13"]], [given["w2"]], [], [], *gate, format, **extras)
    result = npu_grouped_mlp.npu_grouped_mlp(call)
    experts = torch.repeat_interleave(counts)
    gate_, up = torch.einsum("nk,nki->ni", x.double(), w13[experts].double()).tensor_split(2, 1)
    y = torch.einsum("ni,nih->nh", gate_ / (1 + torch.exp(-gate_)) * up, w2[experts].double())
    assert snr(result, y) >= EXPERT_FORMATS[format].snr_floor


@pytest.mark.parametrize("format", EXPERT_FORMATS)
def test_format_is_lowered(format: str) -> None:
    """AllGather on one rank, its operators run with the simulator's kernels."""
    from graph_build import build

    from moe_lowering import MoeLowering
    from moe_lowering.passes.implementations import quantised_mlp

    if format not in {"none", *quantised_mlp.EMITTED}:
        pytest.fail(forgotten(FORMAT, "moe_lowering/passes/implementations/quantised_mlp.py"))
    built, data = build(one_rank(quantisation=format)), drawn(format)[1]
    lowering = MoeLowering(data.case.deployment, "allgather", strict=True)
    lowering(built.gm)
    assert [block.comm for block in lowering.reports[-1].blocks] == ["allgather"]
    assert noise(built, data) >= EXPERT_FORMATS[format].snr_floor


def test_format_is_documented() -> None:
    meanings = bullet("docs/architecture.md", "quantisation")
    told = {word for word in FORMATS if f"`{word}`" in meanings} | {*re.findall(r"`(w\w+)`", meanings)}
    require_words(FORMAT, "docs/architecture.md", told, FORMATS)
    rows = re.findall(r"^\| `(\w+)` \| (\d+) dB \|", page("docs/matrix.md"), re.MULTILINE)
    require_words(FORMAT, "docs/matrix.md", [name for name, _ in rows], EXPERT_FORMATS)
    assert {name: float(floor) for name, floor in rows} == {f.name: f.snr_floor for f in EXPERT_FORMATS.values()}
