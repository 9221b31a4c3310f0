"""The report names each tensor of the experts that the graph casts in every forward, and the dtype to store it in."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lowering import moe_experts, testing

EXPERTS, TOP_K, HIDDEN, INNER = 8, 2, 1024, 512
LOWERED = ("allgather", "alltoall", "mc2")


def tensors(dtypes: dict[str, torch.dtype], packed: int = 1, lists: bool = False) -> dict[str, Any]:
    shapes = {"w13": (HIDDEN, 2 * INNER // packed), "w2": (INNER, HIDDEN // packed)}
    for name, width in (("w13", 2 * INNER), ("w2", HIDDEN)):
        shapes |= {f"{name}_{what}": (width,) for what in ("bias", "scale", "offset", "scale_bias")}
    given = {name: torch.empty(EXPERTS // 2, *shapes[name], dtype=dtype) for name, dtype in dtypes.items()}
    return {name: list(tensor.unbind()) for name, tensor in given.items()} if lists else given


def notes(
    comm: str, dtypes: dict[str, torch.dtype], packed: int = 1, lists: bool = False, run: Any = None, **options: Any
) -> Any:
    """The block's notes that are of casts."""
    fields = {"weight_format": "nd" if lists else "nz"}
    with testing.fake_deployment(ep_size=2, **fields) as where, testing.fake_tensors():
        given = tensors(dtypes, packed, lists)
        x = (
            torch.empty(4, HIDDEN, dtype=torch.bfloat16),
            torch.empty(4, TOP_K),
            torch.empty(4, TOP_K, dtype=torch.int32),
        )

        def layer(x: Tensor, weights: Tensor, ids: Tensor, given: Any) -> Tensor:
            given = run(given) if run else given
            return moe_experts(x, weights, ids, num_experts=EXPERTS, deployment=where, **given, **options)

        lowered = testing.lower_graph(layer, *x, given, deployment=where, comm=comm)
    testing.assert_lowered(lowered, comm=comm)
    found = [note for note in lowered.report.blocks[0].notes if note.startswith("[cost.")]
    assert all(note in " ".join(str(lowered.report).split()) for note in found)
    assert json.loads(json.dumps(lowered.report.to_json()))["blocks"][0]["notes"] == list(
        lowered.report.blocks[0].notes
    )
    return found


W8A8 = {"w13": torch.int8, "w2": torch.int8, "w13_scale": torch.float32, "w2_scale": torch.bfloat16}
W4A8 = {
    "w13": torch.int32, "w2": torch.int32, "w13_scale": torch.int64, "w2_scale": torch.int64,
    "w13_scale_bias": torch.float32, "w2_scale_bias": torch.float32,
}  # fmt: skip
BIASES = dict.fromkeys(("w13", "w2"), torch.bfloat16) | dict.fromkeys(("w13_bias", "w2_bias"), torch.float32)
CASES = {  # what is stored as it is read, the one tensor that is not, the dtype that is read, what else the note says
    "w8a8": (W8A8, {"quantisation": "w8a8"}, "w2_scale", torch.float32, "bfloat16", "quantise_weight"),
    "w4a8": (W4A8, {"quantisation": "w4a8"}, "w13_scale", torch.float32, "int64", "scale_bits"),
    "bias": (BIASES, {}, "w2_bias", torch.bfloat16, "float32", "tensor.to(torch.float32)"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_tensor_that_is_cast_is_named(name: str) -> None:
    stored, options, argument, wrong, read, helper = CASES[name]
    packed = 8 if name == "w4a8" else 1
    comm = LOWERED[list(CASES).index(name) % len(LOWERED)]
    assert notes(comm, stored, packed, **options) == []
    (note,) = notes(comm, {**stored, argument: wrong}, packed, **options)
    was = str(wrong).removeprefix("torch.")
    assert note.startswith(
        f"[cost.cast] {argument} is stored in {was} and cast to {read} in every forward, as {comm} reads it"
    )
    assert helper in note


def test_what_one_implementation_reads_another_casts() -> None:
    """The fused operator takes float32 scales, the grouped matmul the second one in the rows' dtype."""
    (note,) = notes("fused_mc2", W8A8, quantisation="w8a8")
    assert note.startswith("[cost.cast] w2_scale is stored in bfloat16 and cast to float32")
    assert notes("fused_mc2", {**W8A8, "w2_scale": torch.float32}, quantisation="w8a8") == []


def test_lists_are_counted() -> None:
    assert notes("allgather", BIASES, lists=True) == []
    (note,) = notes("allgather", {**BIASES, "w13_bias": torch.bfloat16}, lists=True)
    assert f"in every forward, {EXPERTS // 2} tensors, as allgather reads it" in note


def test_casts_of_the_model_are_told_too() -> None:
    def cast(given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.bfloat16() for name, tensor in given.items()}

    stored = {"w13": torch.float32, "w2": torch.bfloat16}
    (note,) = notes("allgather", stored, run=cast)
    assert note == (
        "[cost.cast_in_model] the model casts w13 from float32 to bfloat16 in every forward: store it in bfloat16"
    )
    assert notes("allgather", stored | {"w13": torch.bfloat16}, run=cast) == []
