"""``quantise_experts``: whole modules, before and after sharding, eager and compiled.

One weight: test_quantisation.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
from int4_by_hand import floats
from quantised_numbers import snr
from rank_pools import Ranks
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_lowering
from moe_lowering import Deployment, MoE, quantise_experts, shard_experts
from moe_lowering.quantisation import FORMATS

pytestmark = pytest.mark.xdist_group("quantisation_ranks")


ops = torch.ops.moe_lowering


TWO = Deployment(ep_size=2, ep_rank=1, ep_group="g")


# Two weights with such errors, the first of them twice (gate and up), and int8 rows (37 dB, test_quantised_mlp.py).
LAYER_DB = {"w8a8": 33.0, "w4a8": 12.5, "w4a16": 13.5}


# modules


def layer(form: str, dtype: torch.dtype | None = None, **options: Any) -> MoE:
    torch.manual_seed(0)
    return MoE(64, 32, 8, 2, dtype=dtype or (torch.float32 if form == "w8a8" else torch.bfloat16), **options)


def dense(moe: MoE, plain: MoE, x: Tensor, **options: Any) -> Tensor:
    """The layer by the references, with the router of ``plain`` and the weights of ``moe`` dequantised."""
    logits = x.float() @ plain.gate.weight.float().t()
    if x.dtype != torch.float32:
        logits = plain.gate(x)
    weights, ids = reference.route(logits, None, 2, "softmax", True, 1, 1, "top2_sum", 1.0)
    w13 = floats(moe.w13, moe.w13_scale, moe.w13_offset)  # type: ignore[arg-type]
    w2 = floats(moe.w2, moe.w2_scale, moe.w2_offset)  # type: ignore[arg-type]
    return reference.moe(x, weights, ids, w13, w2, **options)


LAYERS = [
    *((form, dtype, None) for form in ("w8a8", "w4a8") for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    *(("w4a16", dtype, size) for dtype in (torch.float16, torch.bfloat16) for size in (None, 16)),
]


@pytest.mark.parametrize(("form", "dtype", "group_size"), LAYERS, ids=str)
def test_layer(form: str, dtype: torch.dtype, group_size: int | None) -> None:
    plain, moe = layer(form, dtype), layer(form, dtype)
    assert moe_lowering.quantise_experts(moe, form, group_size=group_size) is moe
    x = torch.randn(3, 16, 64).to(dtype)
    y = moe(x)
    assert y.dtype == dtype and y.shape == x.shape
    expected = dense(moe, plain, x)
    if form == "w4a16":
        reference.assert_near(y, expected, dtype)
    else:
        assert snr(y, expected) > 34  # int8 rows, see INT8_ROWS_DB in test_quantised_mlp.py
    assert snr(y, plain(x)) > LAYER_DB[form]
    assert moe.w2_scale is not None and moe.w13_scale is not None
    half_scale = form == "w8a8" and dtype == torch.bfloat16
    assert moe.w2_scale.dtype == (dtype if form == "w4a16" or half_scale else torch.float32)
    assert moe.w13_scale.dtype == (dtype if form == "w4a16" else torch.float32)
    assert not any(parameter.requires_grad for parameter in moe.parameters())
    moe.w13_scale.copy_(moe.w13_scale.roll(1, -1))
    assert snr(moe(x), expected) < 20  # the comparisons have power


def test_layer_options_pass_through() -> None:
    options: dict[str, Any] = {"activation": "swiglu_oai", "limit": 0.7, "alpha": 1.3, "interleaved": True}
    plain, moe = layer("w8a8", **options), quantise_experts(layer("w8a8", **options), "w8a8")
    x, mask = torch.randn(40, 64), torch.rand(40) > 0.3
    expected = dense(moe, plain, x, mask=mask, **options)  # type: ignore[arg-type]
    assert snr(moe(x, mask), expected) > 34 and not moe(x, mask)[~mask].any()
    assert moe(x[:0]).shape == (0, 64)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", FORMATS)
def test_layer_compiles_to_four_operators(form: str, dynamic: bool) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    moe = quantise_experts(layer(form, activation="swiglu_clamp", limit=3.0), form)
    torch._dynamo.reset()
    compiled = torch.compile(moe, backend=backend, fullgraph=True, dynamic=dynamic)
    for tokens in (10, 12, 33) if dynamic else (10,):
        x = torch.randn(tokens, 64, dtype=torch.float32 if form == "w8a8" else torch.bfloat16)
        assert torch.equal(compiled(x), moe(x))
    assert len(graphs) == 1
    calls = [node for node in graphs[0].graph.nodes if str(node.target).startswith("moe_lowering")]
    names = [str(node.target) for node in calls]
    assert names == [f"moe_lowering.{name}.default" for name in ("route", "dispatch", "grouped_mlp", "combine")]
    quantisers = calls[2].args[11:]
    assert quantisers[0] == form
    given = [bool(nodes) for nodes in quantisers[1:7]]
    assert given == [True, True, form == "w4a16", form == "w4a16", form == "w4a8", form == "w4a8"]


def test_unquantised_graphs_stay_as_they_were() -> None:
    graphs: list[torch.fx.GraphModule] = []
    torch._dynamo.reset()
    torch.compile(layer("w8a8"), backend=lambda graph, _: graphs.append(graph) or graph.forward)(torch.randn(3, 64))
    node = graphs[0].graph.find_nodes(op="call_function", target=ops.grouped_mlp.default)[0]
    assert len(node.args) == 11 and not node.kwargs


# sharding


@pytest.mark.parametrize("form", FORMATS)
def test_shard_before_or_after(form: str) -> None:
    dtype = torch.bfloat16
    before = quantise_experts(shard_experts(layer(form, dtype), TWO), form)
    after = shard_experts(quantise_experts(layer(form, dtype), form), TWO)
    first, second = before.state_dict(), after.state_dict()
    assert list(first) == list(second) and "w13_scale" in first
    assert first["w13"].shape[0] == first["w13_scale"].shape[0] == 4
    for name, value in first.items():
        assert torch.equal(value, second[name]) and value.dtype == second[name].dtype, name
        assert second[name].untyped_storage().nbytes() == second[name].nbytes  # the rest can be freed
    whole = quantise_experts(layer(form, dtype), form).state_dict()
    assert all(torch.equal(whole[n][4:], v) for n, v in first.items() if n != "gate.weight")


def on_ranks(rank: int, form: str) -> tuple[Tensor, Tensor]:
    """y of this rank's tokens with half of the experts, and with all of them."""
    size = dist.get_world_size()
    place = Deployment(ep_size=size, ep_rank=rank, ep_group=dist.group.WORLD.group_name)  # type: ignore[union-attr]
    whole = quantise_experts(layer(form), form)
    part = shard_experts(copy.deepcopy(whole), place)
    x = torch.randn(17, 64, generator=torch.Generator().manual_seed(rank)).to(whole.gate.weight.dtype)  # type: ignore[union-attr, arg-type]
    return part(x), whole(x)


def test_two_ranks_compute_what_one_does() -> None:
    with Ranks(2, collective_timeout=20) as ranks:
        for form in FORMATS:
            results = ranks.run(on_ranks, form)
            for y, alone in results:
                error = reference.relative_error(y, alone)
                assert error <= (reference.BOUNDS[torch.bfloat16] if form == "w4a16" else 0), form
            assert not torch.equal(results[0][0], results[1][0])


def test_state_dict_loads_into_a_layer_on_meta() -> None:
    made = quantise_experts(layer("w4a8"), "w4a8")
    with torch.device("meta"):
        empty = quantise_experts(layer("w4a8"), "w4a8")
    empty.load_state_dict(made.state_dict(), assign=True)
    x = torch.randn(5, 64).bfloat16()
    assert torch.equal(empty(x), made(x))
    with FakeTensorMode():
        fake = quantise_experts(layer("w4a16"), "w4a16")
        assert fake.w13_offset.shape == (8, 64) and fake(torch.randn(5, 64).bfloat16()).shape == (5, 64)  # type: ignore[union-attr]


def test_modules_that_are_refused() -> None:
    with pytest.raises(ValueError, match="quantise_experts: Linear has no MoE module; accepted: a model with"):
        quantise_experts(nn.Linear(2, 2), "w8a8")
    model = nn.ModuleDict({"good": layer("w8a8"), "biased": layer("w8a8", expert_bias=True)})
    with pytest.raises(ValueError, match="quantise_experts: biased has expert biases"):
        quantise_experts(model, "w8a8")
    assert model["good"].moe_lowering_quantisation == "none" and model["good"].w13.dtype == torch.float32  # untouched
    with pytest.raises(ValueError, match="quantise_experts: MoE is w8a8 already"):
        quantise_experts(quantise_experts(layer("w8a8"), "w8a8"), "w4a8")
    with pytest.raises(ValueError, match="quantise_experts: format is 'int4'; accepted: w8a8, w4a8, w4a16"):
        quantise_experts(layer("w8a8"), "int4")
    with pytest.raises(
        ValueError, match="MoE: w2: quantise_weight: w has 20 columns for w4a8; accepted: a multiple of 8"
    ):
        quantise_experts(MoE(20, 16, 4, 2), "w4a8")
    with pytest.raises(
        TypeError, match=r"MoE: w13: quantise_weight: scale_dtype is None and w is torch.float32 for w4a16"
    ):
        quantise_experts(layer("w8a8", torch.float32), "w4a16")
    with pytest.raises(ValueError, match="MoE: w13: quantise_weight: group_size is 48; accepted: a divisor of 64"):
        quantise_experts(layer("w4a16"), "w4a16", group_size=48)


# transformers


def num_experts_of(model_type: str, dtype: torch.dtype, **changes: Any) -> nn.Module:
    """A small model's experts module, computed by ``moe_lowering``."""
    import test_transformers

    from moe_lowering.integrations import transformers as integration

    integration.register()
    module = test_transformers.experts(test_transformers.make(model_type, dtype, **changes))[0]
    module.config._experts_implementation = "moe_lowering"
    return module


@pytest.mark.parametrize("sharded", ["no", "before", "after"])
@pytest.mark.parametrize(
    ("form", "dtype"), [("w8a8", torch.float32), ("w4a8", torch.bfloat16), ("w4a16", torch.bfloat16)]
)
def test_transformers_experts(form: str, dtype: torch.dtype, sharded: str) -> None:
    module = num_experts_of("qwen3_moe", dtype)
    torch.manual_seed(0)
    x, ids, weights = torch.randn(32, 64).to(dtype), torch.rand(32, 8).topk(2).indices, torch.rand(32, 2)
    plain = module(x, ids, weights)
    if sharded == "before":
        shard_experts(module, Deployment())
    quantise_experts(module, form)
    if sharded == "after":
        shard_experts(module, Deployment())
    assert module.is_transposed is True and module.moe_lowering_quantisation == form
    w13, w2 = (
        floats(getattr(module, name), getattr(module, f"{name}_scale"), getattr(module, f"{name}_offset"))
        for name in ("gate_up_proj", "down_proj")
    )
    y = module(x, ids, weights)
    assert y.dtype == dtype
    assert snr(y, reference.moe(x, weights, ids, w13, w2)) > 34
    assert snr(y, plain) > LAYER_DB[form]
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(x, ids, weights), y)
    if form == "w4a16":  # tokens of another dtype are cast to that of the scales
        assert module(x.float(), ids, weights).dtype == torch.float32


def test_transformers_experts_that_are_refused() -> None:
    with pytest.raises(ValueError, match="quantise_experts: GptOssExperts has expert biases"):
        quantise_experts(num_experts_of("gpt_oss", torch.float32), "w8a8")
    spread = num_experts_of("qwen3_moe", torch.float32)
    spread._is_expert_parallel = True
    with pytest.raises(ValueError, match="was sharded by transformers"):
        quantise_experts(spread, "w8a8")
    other = num_experts_of("qwen3_moe", torch.float32)
    other.act_fn = nn.ReLU()
    quantise_experts(other, "w8a8")
    with pytest.raises(NotImplementedError, match=r"not SiLU or GELU. Its experts are quantised, so it cannot use"):
        other(torch.randn(3, 64), torch.tensor([[0, 1]] * 3), torch.rand(3, 2))
