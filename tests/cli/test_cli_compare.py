"""How ``moe-lowering lower`` compares a lowered model with the model's own experts."""

from __future__ import annotations

import copy

import pytest
import torch

from moe_lowering.cli.lower import compare, models
from moe_lowering.cli.lower.request import LowerRequest
from moe_lowering.integrations import transformers as integration


@pytest.fixture(autouse=True)
def registered():
    integration.register()


def test_nan_infinity_and_another_shape_are_the_worst_error():
    good = torch.ones(3)
    for bad in (torch.tensor([1.0, float("nan"), 1.0]), torch.tensor([1.0, float("inf"), 1.0]), torch.ones(4)):
        assert compare.difference(bad, good) == (compare.WORST, compare.WORST)
    assert compare.difference(good, good) == (0.0, 0.0)
    assert compare.difference(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0])) == (1.0, 0.25)


@pytest.fixture(scope="module")
def stack() -> models.MoeStack:
    model = models.MoeStack(64, 32, 16, 4, 2, torch.float32).eval().requires_grad_(False)
    models.randomise(model)
    return model


def recorded(model: models.MoeStack, input_ids: torch.Tensor) -> tuple[torch.Tensor, compare.Taken]:
    watched = copy.deepcopy(model)
    taken = compare.record(watched)
    return watched(input_ids), taken


def test_the_generic_operators_agree_with_plain_torch(stack: models.MoeStack):
    input_ids = torch.arange(32).view(2, 16)
    errors = compare.compare(copy.deepcopy(stack), input_ids, *recorded(stack, input_ids))
    assert max(errors.relative, errors.block_relative) < 1e-5
    assert (errors.rerouted, errors.routed) == (0, 64)


def test_an_error_in_one_block_is_seen_at_the_block_even_where_logits_hide_it(stack: models.MoeStack):
    input_ids = torch.arange(32).view(2, 16)
    small = copy.deepcopy(stack)
    for layer in small.layers:
        layer.w2.mul_(1e-4)  # what the experts say drowns in the residual stream
    broken = copy.deepcopy(small)
    broken.layers[1].w13.copy_(broken.layers[1].w13.roll(32, -1))  # gate and up exchanged
    errors = compare.compare(small, input_ids, *recorded(broken, input_ids))
    assert errors.relative < compare.TOLERANCE["bfloat16"] < errors.block_relative


def test_tokens_that_went_to_other_experts_are_replayed_and_counted():
    """The lowered run is one in which three tokens went to other experts in the first layer."""
    made = models.plan_model(LowerRequest("mixtral"))
    reference = models.build(made, torch.float32)
    models.randomise(reference)
    compare.use_reference(reference)
    lowered = copy.deepcopy(reference)
    moved = torch.tensor([3, 4, 20])

    def move(module, arguments):
        x, ids, weights = arguments
        return x, ids.index_copy(0, moved, (ids[moved] + 1) % 16), weights

    compare.moe_modules(lowered)[0].register_forward_pre_hook(move)
    taken = compare.record(lowered)
    input_ids = models.input_ids(made, LowerRequest("mixtral"), 16, 0)
    actual = models.logits(lowered, input_ids)
    errors = compare.compare(reference, input_ids, actual, taken)
    assert (errors.rerouted, errors.routed) == (3, 64)
    assert max(errors.relative, errors.block_relative) < 1e-5
    assert compare.difference(actual, models.logits(reference, input_ids))[1] > 0.1  # what it would be otherwise


def test_a_comparison_that_misses_a_block_is_an_error(stack: models.MoeStack):
    input_ids = torch.arange(32).view(2, 16)
    logits, taken = recorded(stack, input_ids)
    with pytest.raises(RuntimeError, match="2 MoE modules, of which 1 ran"):
        compare.compare(copy.deepcopy(stack), input_ids, logits, taken[:1])
