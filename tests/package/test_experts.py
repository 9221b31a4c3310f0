"""Expert maps of all ranks as one log2phy, and experts as one tensor each, which mega_moe takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moe_lowering
from moe_lowering import MoE, moe_experts, testing
from moe_lowering.experts import list_experts, log2phy_from_expert_maps
from moe_lowering.vocabulary import EXPERT_FORMATS

T, H, INNER, E, K = 11, 32, 16, 6, 2


def tokens_and_experts() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(3)
    ids = torch.rand(T, E).topk(K).indices
    return torch.randn(T, H), torch.rand(T, K), ids, torch.randn(E, H, 2 * INNER) / 6, torch.randn(E, INNER, H) / 4


# Where each logical expert is: (rank, slot); two ranks of four slots, the last one with two copies or an empty slot.
PLACEMENTS = {
    "round robin": [{0: 0, 2: 1, 4: 2}, {1: 0, 3: 1, 5: 2}],
    "redundant": [{5: 0, 2: 1, 4: 2, 1: 3}, {1: 2, 3: 1, 0: 0, 5: 3}],
    "uneven": [{0: 0, 1: 1, 2: 2, 3: 3}, {4: 1, 5: 0}],
}


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_placement_is_a_choice_of_physical_experts(name: str, dtype: torch.dtype) -> None:
    """All slots of both ranks in one process, filled as the maps say; empty slots hold NaN, which no token may meet."""
    maps = [torch.tensor([held.get(e, -1) for e in range(E)], dtype=dtype) for held in PLACEMENTS[name]]
    x, weights, ids, w13, w2 = tokens_and_experts()
    local = max(max(held.values()) for held in PLACEMENTS[name]) + 1
    physical = [torch.full((2 * local, *w.shape[1:]), float("nan")) for w in (w13, w2)]
    for rank, held in enumerate(PLACEMENTS[name]):
        for expert, slot in held.items():
            for slots, w in zip(physical, (w13, w2), strict=True):
                slots[rank * local + slot] = w[expert]
    log2phy, count = log2phy_from_expert_maps(maps)
    assert (log2phy.dtype, count) == (torch.int32, 2 * local)
    y = moe_experts(x, weights, ids, *physical, log2phy=log2phy, num_experts=count)
    torch.testing.assert_close(y, moe_experts(x, weights, ids, w13, w2))


def test_shared_expert_ranks_hold_no_routed_experts() -> None:
    """Their maps come first; the operators count routed experts from the rank after them."""
    nothing, routed = [torch.full((4,), -1)] * 2, [torch.tensor([0, -1, 1, -1]), torch.tensor([-1, 0, -1, 1])]
    log2phy, count = log2phy_from_expert_maps([*nothing, *routed], shared_expert_ranks=2)
    assert (log2phy.tolist(), count) == ([0, 2, 1, 3], 4)
    with pytest.raises(ValueError, match=r"expert_maps\[2\] has slot 0 for expert 0, and rank 2 holds a shared expert"):
        log2phy_from_expert_maps([*nothing, *routed], shared_expert_ranks=3)
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=f"shared_expert_ranks is {wrong}; accepted: an int from 0 to 3"):
            log2phy_from_expert_maps([*nothing, *routed], shared_expert_ranks=wrong)


@pytest.mark.parametrize(("maps", "error", "message"), [
    ([], ValueError, "expert_maps is empty"),
    ([[0, 1, -1], [0, -1]], TypeError, r"expert_maps\[1\] is torch.int64 of shape \[2\]; accepted: .* \[3\]"),
    ([[0, 0, -1], [-1, -1, 0]], ValueError, r"expert_maps\[0\] has slot 0 for the experts 0 and 1"),
    ([[0, -1, -1], [-1, -1, 0]], ValueError, "no rank has expert 1"),
])  # fmt: skip
def test_wrong_maps_are_named(maps: list[list[int]], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        log2phy_from_expert_maps([torch.tensor(each) for each in maps])


def layer(**options: object) -> MoE:
    torch.manual_seed(4)
    return MoE(64, 32, 4, 2, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("quantisation", EXPERT_FORMATS)
def test_lists_give_what_stacked_experts_gave(quantisation: str) -> None:
    module = layer(dtype=torch.bfloat16)
    if quantisation != "none":
        moe_lowering.quantise_experts(module, quantisation)
    x = torch.randn(9, 64, dtype=torch.bfloat16)
    stacked, names = module(x), {name for name, _ in module.named_parameters()}
    assert list_experts(module) is module
    assert torch.equal(module(x), stacked)
    assert all(each.is_contiguous() and each.dim() == 2 for each in module.w13)
    assert {name.rstrip("0123456789").rstrip(".") for name, _ in module.named_parameters()} == names
    held = list(module.w13)
    list_experts(module)
    assert all(a is b for a, b in zip(module.w13, held, strict=True)), "a second call made copies"
    placed = moe_lowering.shard_experts(layer(), moe_lowering.Deployment())
    list_experts(placed)
    held = list(placed.w13)
    moe_lowering.shard_experts(placed, moe_lowering.Deployment())  # a second call changes nothing, lists or not
    assert all(a is b for a, b in zip(placed.w13, held, strict=True))
    for call in (lambda: moe_lowering.shard_experts(module, moe_lowering.Deployment()),
                 lambda: moe_lowering.quantise_experts(module, "w8a8")):  # fmt: skip
        with pytest.raises(ValueError, match=r"one tensor for each expert|already"):
            call()


def test_biases_become_lists_too() -> None:
    module, x = layer(expert_bias=True), torch.randn(5, 64)
    nn.init.normal_(module.w13_bias)
    stacked = module(x)
    assert torch.equal(list_experts(module)(x), stacked)
    assert isinstance(module.w13_bias, nn.ParameterList)


def test_experts_of_transformers_are_turned() -> None:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from moe_lowering.integrations.transformers import experts_forward

    config = Qwen3MoeConfig(hidden_size=64, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    experts = Qwen3MoeExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, ids, weights = torch.randn(7, 64), torch.rand(7, 4).topk(2).indices, torch.rand(7, 2)
    with torch.no_grad():
        own = experts.forward(x, ids, weights)
        list_experts(experts)
        assert experts.gate_up_proj[0].shape == (64, 64) and experts.gate_up_proj[0].is_contiguous()
        torch.testing.assert_close(experts_forward(experts, x, ids, weights), own)


def lowered(lists: bool) -> testing.Lowered:
    """One MoE layer where CANN's operator is installed."""
    providers = (("cann_ops_transformer", "9.1.0"),)
    with testing.fake_deployment(ep_size=8, providers=providers, weight_format="nd", max_tokens=64) as deployment:
        with testing.fake_tensors():
            module = MoE(1024, 1024, 64, 4, deployment=deployment, dtype=torch.bfloat16)
            if lists:
                list_experts(module)
            x = torch.empty(32, 1024, dtype=torch.bfloat16)
        return testing.lower_graph(module, x, deployment=deployment, comm="fused_mc2")


def test_mega_moe_takes_a_model_with_lists() -> None:
    testing.assert_lowered(lowered(True), comm="fused_mc2", ops=["moe_lowering.mega_moe"])


def test_and_refuses_its_twin() -> None:
    testing.assert_refused(lowered(False), comm="fused_mc2", code="mega_moe.weight_list")
