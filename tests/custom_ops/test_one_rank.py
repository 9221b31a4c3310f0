"""``moe_experts`` in one function on one rank: the bits of the three operators, what it refuses, and who still sees operators."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lowering import Deployment, moe_experts
from moe_lowering.custom_ops import one_rank
from moe_lowering.vocabulary import ACTIVATIONS

HIDDEN, INNER, EXPERTS, TOP_K = 32, 16, 8, 3
FEW = one_rank.FEW // TOP_K  # tokens on either side of where slots are sorted by an operator


def layer(tokens: int, dtype: torch.dtype = torch.bfloat16, experts: int = EXPERTS, wide: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :TOP_K].int()
    return {
        "x": normal(tokens, HIDDEN), "weights": torch.rand(tokens, TOP_K, generator=generator), "ids": ids,
        "w13": normal(experts, HIDDEN, wide * INNER) / 4, "w2": normal(experts, INNER, HIDDEN) / 4,
    }  # fmt: skip


class Seen(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


GENERIC = ["moe_lowering::dispatch", "moe_lowering::grouped_mlp", "moe_lowering::combine"]


def by_operators(given: dict[str, Any]) -> Tensor:
    with Seen() as seen:
        y = moe_experts(**given)
    assert [name for name in seen.names if name.startswith("moe_lowering")] == GENERIC
    return y


@pytest.fixture(autouse=True)
def computed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call was computed in one function. Nothing is known of calls before."""
    monkeypatch.setattr(one_rank, "_PASSED", set())
    outcomes: list[bool] = []
    compute = one_rank.compute

    def noted(*arguments: Any) -> Any:
        y = compute(*arguments)
        outcomes.append(y is not None)
        return y

    monkeypatch.setattr(one_rank, "compute", noted)
    return outcomes


SIZES = [*itertools.product((1, 2, 5, FEW, FEW + 1, 50), (EXPERTS, 40))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_bits_of_the_operators(dtype: torch.dtype, computed: list[bool]) -> None:
    for tokens, experts in SIZES:
        given = layer(tokens, dtype, experts)
        for case in (given, {**given, "ids": given["ids"].long(), "weights": given["weights"].double()}):
            computed.clear()
            first, second = moe_experts(**case), moe_experts(**case)
            assert computed == [False, True], "the operators check the first call"
            assert torch.equal(first, second) and torch.equal(second, by_operators(case))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, computed: list[bool]) -> None:
    form = ACTIVATIONS[activation]
    options = {"activation": activation, **({"limit": 1.5, "alpha": 1.1} if form.clamped else {})}
    for tokens, interleaved in itertools.product((1, 4, 50), (False, True) if form.gated else (False,)):
        given = {**layer(tokens, wide=form.parts), **options, "interleaved": interleaved}
        computed.clear()
        first, second = moe_experts(**given), moe_experts(**given)
        assert computed == [False, True] and torch.equal(first, second)
        assert torch.equal(second, by_operators(given))


def test_leading_dimensions_and_views(computed: list[bool]) -> None:
    given = layer(24)
    shaped = {**given, "w13": given["w13"].transpose(1, 2).contiguous().transpose(1, 2)}
    for name in ("x", "weights", "ids"):
        shaped[name] = given[name].view(2, 12, -1)
    for _ in range(2):
        y = moe_experts(**shaped)
    assert computed == [False, True] and y.shape == (2, 12, HIDDEN)
    assert torch.equal(y.view(24, HIDDEN), by_operators({**given, "w13": shaped["w13"]}))


@pytest.mark.parametrize("tokens", [1, 4, 50])
@pytest.mark.parametrize(("wrong", "message"), [
    ({"at": EXPERTS}, f"ids has {EXPERTS} for token"), ({"at": -1}, "ids has -1 for token"), ({"twice": True}, "twice for token"),
    ({"at": 2**62}, "which is no int32"), ({"at": -(2**62)}, "which is no int32"),
])  # fmt: skip
def test_wrong_ids_are_refused_as_before(
    tokens: int, wrong: dict[str, Any], message: str, computed: list[bool]
) -> None:
    """Only what does not depend on data is known of a call that was checked: the next one's ids may be anything."""
    given = layer(tokens)
    given["ids"] = given["ids"].long()
    moe_experts(**given)
    ids = given["ids"].clone()
    ids[-1, 1] = ids[-1, 0] if "twice" in wrong else wrong["at"]
    with pytest.raises(ValueError, match=message):
        moe_experts(**{**given, "ids": ids})
    assert computed == [False, False]
    assert torch.equal(moe_experts(**given), by_operators(given))


CHANGES: dict[str, Any] = {  # of a call whose like was checked, one argument that is wrong
    "limit as a flag": ({"limit": False}, ValueError),
    "interleaved as a number": ({"interleaved": 0}, ValueError),
    "another activation": ({"activation": "swiglu2"}, ValueError),
    "a limit of none": ({"limit": 3.0}, ValueError),
    "more experts than there are": ({"num_experts": EXPERTS + 1}, ValueError),
    "experts as a float": ({"num_experts": float(EXPERTS)}, (TypeError, ValueError)),
    "need_trans as a number": ({"need_trans": 0}, ValueError),
    "no deployment": ({"deployment": 0}, ValueError),
    "a bound on tokens": ({"deployment": Deployment(max_tokens=2, equal_tokens=False)}, ValueError),
    "a bound on rows": ({"deployment": Deployment(max_rows=2)}, RuntimeError),
    "weights of integers": ({"weights": torch.ones(4, TOP_K, dtype=torch.int32)}, TypeError),
    "other tokens": ({"x": torch.ones(4, HIDDEN // 2, dtype=torch.bfloat16)}, ValueError),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_wrong_otherwise_is_refused_as_before(name: str, computed: list[bool]) -> None:
    change, error = CHANGES[name]
    given = {**layer(4), "limit": None, "interleaved": False, "num_experts": EXPERTS}
    moe_experts(**given)
    for _ in range(2):  # what was refused is not remembered
        with pytest.raises(error):
            moe_experts(**{**given, **change})
    moe_experts(**given)
    assert computed[-1] and not any(computed[:-1])


def counted(given: dict[str, Any], computed: list[bool], run: Any = moe_experts) -> Tensor:
    """The result of a call that must not be computed in one function though its like was checked."""
    for _ in range(2):
        moe_experts(**given)
    assert computed == [False, True]
    computed.clear()
    y = run(**given)
    assert not any(computed)
    return y


def test_modes_and_compilers_see_the_operators(computed: list[bool]) -> None:
    given = layer(4)
    y = counted(given, computed, lambda **given: by_operators(given))
    graphs = []

    def backend(gm: Any, _: Any) -> Any:
        graphs.append([str(node.target) for node in gm.graph.nodes if "moe_lowering" in str(node.target)])
        return gm.forward

    compiled = torch.compile(lambda **given: moe_experts(**given), backend=backend, fullgraph=True)
    assert torch.equal(compiled(**given), y) and not any(computed)
    assert len(graphs[0]) == len(GENERIC)


def test_transforms_tracers_and_autocast_are_not_gone_around(computed: list[bool]) -> None:
    given = layer(4)

    def cast(**given: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return moe_experts(**given)

    counted(given, computed, cast)
    lines = {name: given[name].unsqueeze(0) for name in ("x", "weights", "ids")}
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda x: moe_experts(**{**given, "x": x}))(given["x"])
    assert [
        name
        for node in traced.graph.nodes
        if (name := str(node.target).rsplit(".", 1)[0].replace(".", "::")) in GENERIC
    ] == GENERIC
    with pytest.raises(RuntimeError, match="moe_lowering::"):
        torch.vmap(lambda x, weights, ids: moe_experts(x, weights, ids, given["w13"], given["w2"]))(*lines.values())
    with torch._subclasses.FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(tensor) for name, tensor in given.items()}
        assert moe_experts(**fake).shape == (4, HIDDEN)
    assert not any(computed)


def test_gradients_are_refused_as_before(computed: list[bool]) -> None:
    given = layer(4)
    for _ in range(2):
        moe_experts(**given)
    wanted = {**given, "x": given["x"].clone().requires_grad_()}
    computed.clear()
    with pytest.raises(NotImplementedError, match="has no backward"):
        moe_experts(**wanted).sum().backward()
    with torch.no_grad():
        assert torch.equal(moe_experts(**wanted), moe_experts(**given))
    assert computed == [True, True]


def test_subclasses_and_what_is_more_than_a_layer(computed: list[bool]) -> None:
    class Own(Tensor):
        pass

    given = layer(4)
    for change in (
        {"x": given["x"].as_subclass(Own)},
        {"mask": torch.ones(4, dtype=torch.bool)},
        {"return_counts": True},
        {"w13": list(given["w13"])},
        {"w2_bias": torch.zeros(EXPERTS, HIDDEN)},
    ):
        for _ in range(2):
            moe_experts(**{**given, **change})
    assert not any(computed)


def test_a_deployment_of_one_rank_is_one_rank(computed: list[bool]) -> None:
    given = {**layer(4), "deployment": Deployment(max_tokens=8, equal_tokens=False)}
    for _ in range(2):
        moe_experts(**given)
    assert computed == [False, True]
    other = {**given, "deployment": dataclasses.replace(given["deployment"], max_tokens=16)}
    moe_experts(**other)
    assert computed == [False, True, False], "another bound is checked by itself"
