"""``MoE`` and ``shard_experts`` on one rank; on several ranks: test_custom_ops_ranks.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_lowering import Deployment, list_experts, quantise_experts
from moe_lowering.layers.expert_modules import is_experts_module
from moe_lowering.layers.moe import MoE
from moe_lowering.layers.sharding import shard_experts

TWO = Deployment(ep_size=2, ep_rank=1, ep_group="g")


def layer(**options: Any) -> MoE:
    torch.manual_seed(0)
    moe = MoE(32, 24, 8, 2, **options)
    for tensor in (moe.w13_bias, moe.w2_bias, moe.selection_bias):
        if tensor is not None:
            nn.init.normal_(tensor)
    return moe


OPTIONS: list[dict[str, Any]] = [
    {},
    {"selection_bias": True, "scoring": "sigmoid", "num_groups": 4, "topk_groups": 2, "scale": 2.5},
    {"activation": "swiglu_oai", "limit": 0.7, "alpha": 1.3, "interleaved": True, "expert_bias": True},
    {"activation": "gelu_tanh", "renormalize": False, "scoring": "sqrtsoftplus"},
    {"num_groups": 4, "topk_groups": 3, "group_score": "max", "activation": "swiglu_clamp", "limit": 0.4},
]


def dense(moe: MoE, x: Tensor, options: dict[str, Any], mask: Tensor | None = None) -> Tensor:
    """The layer by the references alone, from its parameters and the options that it was made with."""
    route = {"scoring": "softmax", "renormalize": True, "num_groups": 1, "topk_groups": 1, "group_score": "top2_sum"}
    route |= {"scale": 1.0} | {name: value for name, value in options.items() if name in (*route, "scale")}
    weights, ids = reference.route(x.double() @ moe.gate.weight.double().t(), moe.selection_bias, 2, **route)  # type: ignore[arg-type]
    experts = {n: v for n, v in options.items() if n in ("activation", "limit", "alpha", "interleaved")}
    return reference.moe(
        x, weights, ids, moe.w13, moe.w2, w13_bias=moe.w13_bias, w2_bias=moe.w2_bias, mask=mask, **experts
    )


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "defaults")
def test_layer_against_reference(options: dict[str, Any]) -> None:
    moe = layer(**options)
    assert not any(parameter.requires_grad for parameter in moe.parameters())
    x = torch.randn(2, 7, 32)
    mask = torch.rand(2, 7) > 0.3
    reference.assert_near(moe(x), dense(moe, x, options), torch.float32)
    reference.assert_near(moe(x, mask), dense(moe, x, options, mask), torch.float32)
    with pytest.raises(AssertionError, match="relative error"):  # the comparison has power
        reference.assert_near(moe(x).roll(1, 0), dense(moe, x, options), torch.float32)


@pytest.mark.parametrize("dynamic", [False, True])
def test_layer_compiles_to_four_operators(dynamic: bool) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    moe = layer(**OPTIONS[2])
    torch._dynamo.reset()
    compiled = torch.compile(moe, backend=backend, fullgraph=True, dynamic=dynamic)
    for tokens in (10, 12, 33) if dynamic else (10,):
        x = torch.randn(tokens, 32)
        assert torch.equal(compiled(x), moe(x))
    assert len(graphs) == 1
    names = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    ours = [name for name in names if name.startswith("moe_lowering")]
    assert ours == [f"moe_lowering.{name}.default" for name in ("route", "dispatch", "grouped_mlp", "combine")]


def test_layer_for_a_deployment_holds_its_share() -> None:
    moe = MoE(32, 24, 8, 2, deployment=TWO, expert_bias=True, device="meta", dtype=torch.bfloat16)
    assert moe.w13.shape == (4, 32, 48) and moe.w2.shape == (4, 24, 32) and moe.gate.weight.shape == (8, 32)
    assert moe.w13_bias is not None and moe.w13_bias.shape == (4, 48)
    assert moe.w13.dtype == torch.bfloat16
    assert shard_experts(moe, TWO) is moe and moe.w13.shape == (4, 32, 48)
    with pytest.raises(ValueError, match="num_experts is 9; accepted: a multiple of ep_size, 2"):
        MoE(32, 24, 9, 2, deployment=TWO)


def test_shard_own_layers() -> None:
    whole = layer(expert_bias=True)
    model = nn.Sequential(nn.Linear(32, 32), layer(expert_bias=True))
    assert shard_experts(model, TWO) is model
    moe = model[1]
    assert isinstance(moe, MoE)
    for name in ("w13", "w2", "w13_bias", "w2_bias"):
        part = getattr(moe, name)
        assert torch.equal(part, getattr(whole, name)[4:])
        assert part.is_contiguous() and part.untyped_storage().nbytes() == part.nbytes  # the rest can be freed
        assert isinstance(part, nn.Parameter) and not part.requires_grad
    assert moe.num_experts == 8 and torch.equal(moe.gate.weight, whole.gate.weight)
    assert moe.moe_lowering_deployment == TWO
    shard_experts(model, TWO)
    assert moe.w13.shape[0] == 4
    with pytest.raises(ValueError, match="1 was sharded for another deployment"):
        shard_experts(model, TWO.replace(ep_rank=0))


def test_modules_that_share_a_parameter_share_its_part() -> None:
    model = nn.ModuleList([layer(), layer(), layer()])
    model[1].w13 = model[0].w13
    whole = model[2].w13
    shard_experts(model, TWO)
    first, second, third = model
    assert first.w13 is second.w13 and torch.equal(first.w13, whole[4:])
    assert third.w13 is not first.w13 and first.w2 is not second.w2
    assert sum(1 for name, _ in model.named_parameters() if name.endswith("w13")) == 2


def test_shard_refuses() -> None:
    with pytest.raises(ValueError, match="shard_experts: Linear has no MoE module; accepted: a model with"):
        shard_experts(nn.Linear(2, 2), TWO)
    model = nn.ModuleDict({"good": MoE(8, 8, 4, 2), "odd": MoE(8, 8, 9, 2)})
    with pytest.raises(ValueError, match="shard_experts: odd: num_experts is 9; accepted: a multiple of ep_size, 2"):
        shard_experts(model, TWO)
    good = model["good"]
    assert isinstance(good, MoE) and good.w13.shape[0] == 4 and good.moe_lowering_deployment is None  # untouched


CHANGES: list[Callable[[nn.Module], nn.Module]] = [
    lambda model: shard_experts(model, TWO),
    lambda model: quantise_experts(model, "w8a8"),
    list_experts,
]


def take_out(module: MoE) -> Tensor:
    """``w2`` as a plain tensor, which the module has no more."""
    weight = module._parameters.pop("w2")
    assert weight is not None
    return weight.data


COMPUTED: dict[str, tuple[Callable[[MoE], object], Callable[[MoE], object]]] = {
    "parametrised": (
        lambda odd: nn.utils.parametrize.register_parametrization(odd, "w2", nn.Identity()),
        lambda odd: nn.utils.parametrize.remove_parametrizations(odd, "w2"),
    ),
    "weight_norm": (
        lambda odd: nn.utils.weight_norm(odd, "w2"),
        lambda odd: nn.utils.remove_weight_norm(odd, "w2"),
    ),
}
HELD: dict[str, Callable[[MoE], object]] = {
    "buffer": lambda odd: odd.register_buffer("w2", take_out(odd)),
    "attribute": lambda odd: setattr(odd, "w2", take_out(odd)),
}


@pytest.mark.parametrize("change", CHANGES, ids=("shard", "quantise", "list"))
@pytest.mark.parametrize("kind", [*COMPUTED, *HELD])
def test_experts_that_are_computed_are_refused(change: Callable[[nn.Module], nn.Module], kind: str) -> None:
    good, odd = MoE(8, 8, 4, 2), MoE(8, 8, 4, 2)
    model = nn.ModuleDict({"good": good, "odd": odd})
    if kind in HELD:
        HELD[kind](odd)
    else:
        compute, undo = COMPUTED[kind]
        compute(odd)
        with pytest.raises(
            ValueError, match=r"_experts: odd: w2 is computed; accepted: a parameter .*remove_weight_norm"
        ):
            change(model)
        assert good.w13.shape[0] == 4 and good.w13.dtype == torch.float32  # untouched
        undo(odd)
    change(model)
    assert len(odd.w2) == len(good.w2) and odd.w2[0].dtype == good.w2[0].dtype


def experts_modules() -> list[nn.Module]:
    """Experts of transformers: [E, 2I, H] without bias, and [E, H, 2I] with bias and alternating columns."""
    from transformers import GptOssConfig, Qwen3MoeConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    torch.manual_seed(1)
    qwen = Qwen3MoeExperts(Qwen3MoeConfig(hidden_size=32, moe_intermediate_size=24, num_experts=8))
    gpt = GptOssExperts(GptOssConfig(hidden_size=32, intermediate_size=24, num_local_experts=8))
    for module in (qwen, gpt):
        module.config._experts_implementation = "grouped_mm"
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.2)
    return [qwen, gpt]


@pytest.mark.parametrize("which", [0, 1])
def test_shard_transformers_experts(which: int) -> None:
    import copy

    whole = experts_modules()[which]
    assert is_experts_module(whole) and not is_experts_module(layer())
    transposed = bool(whole.is_transposed)
    sharded = copy.deepcopy(whole)
    shard_experts(sharded, TWO)
    for name, last in (("gate_up_proj", 48), ("down_proj", 32)):
        old, new = getattr(whole, name), getattr(sharded, name)
        assert torch.equal(new, (old if transposed else old.transpose(1, 2))[4:])
        assert new.shape[0] == 4 and new.shape[2] == last and new.is_contiguous()
        assert new.untyped_storage().nbytes() == new.nbytes
        assert isinstance(new, nn.Parameter) and new.requires_grad == old.requires_grad
    if whole.has_bias:
        assert torch.equal(sharded.gate_up_proj_bias, whole.gate_up_proj_bias[4:])  # type: ignore[index, arg-type]
        assert torch.equal(sharded.down_proj_bias, whole.down_proj_bias[4:])  # type: ignore[index, arg-type]
    assert sharded.is_transposed is True
    assert sharded.num_experts == sharded.moe_lowering_num_experts == 8
    assert sharded.moe_lowering_deployment == TWO


@pytest.mark.parametrize("which", [0, 1])
def test_new_layout_means_the_same_to_transformers(which: int) -> None:
    experts = experts_modules()[which]
    x, ids = torch.randn(9, 32), torch.rand(9, 8).topk(2).indices
    weights = torch.rand(9, 2)
    with torch.no_grad():
        before = experts(x, ids, weights)
        after = shard_experts(experts, Deployment())(x, ids, weights)
    reference.assert_near(after, before.double(), torch.float32)


def test_shard_refuses_what_transformers_sharded() -> None:
    experts = experts_modules()[0]
    experts._is_expert_parallel = True
    with pytest.raises(ValueError, match="Qwen3MoeExperts was sharded by transformers"):
        shard_experts(experts, TWO)


def test_shard_reads_no_data() -> None:
    with torch.device("meta"):
        on_meta = nn.ModuleList([*experts_modules(), MoE(32, 24, 8, 2, expert_bias=True)])
    with FakeTensorMode():
        fake = nn.ModuleList([*experts_modules(), MoE(32, 24, 8, 2, expert_bias=True)])
        shard_experts(fake, TWO)
    shard_experts(on_meta, TWO)
    for model in (on_meta, fake):
        assert model[0].gate_up_proj.shape == (4, 32, 48) and model[1].down_proj.shape == (4, 24, 32)
        assert model[2].w13.shape == (4, 32, 48)
