"""Models of fake tensors that are made from models on meta are those that are built under fake tensors."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from moe_lowering.cli import collection
from moe_lowering.cli.lower import fake_weights, models
from moe_lowering.cli.lower.request import LowerRequest
from moe_lowering.integrations.transformers import register


class Held(nn.Module):
    """A parameter under two names, a buffer, an attribute and a setting."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 6, dtype=torch.bfloat16).t(), requires_grad=False)
        self.tied = self.weight
        self.register_buffer("table", torch.arange(5))
        self.scale = torch.ones((), dtype=torch.float64)
        self.names = ["a"]


def described(model: nn.Module) -> list[object]:
    """All tensors of a model by place, each with its first place."""
    first: dict[int, str] = {}
    return [
        (
            where := f"{place}.{name}",
            first.setdefault(id(value), where),
            type(value),
            tuple(value.shape),
            value.stride(),
            value.dtype,
            value.device,
            value.requires_grad,
            isinstance(value, nn.Parameter),
        )
        for place, module in model.named_modules()
        for values in (module._parameters, module._buffers, vars(module))
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    ]


@pytest.mark.parametrize("kind", ["deepseek_v3", "gpt_oss", "moe", "own"])
def test_it_is_what_is_built_under_fake_tensors(kind: str):
    register()
    plan = models.plan_model(LowerRequest(kind, fake=True, layers=1)) if kind != "own" else None

    def build() -> nn.Module:
        return models.build(plan, torch.bfloat16, fake=True) if plan else Held()

    with FakeTensorMode(allow_non_fake_inputs=True):
        expected = described(build())
    with torch.device("meta"):
        model = build()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    assert fake_weights.make_fake(model, mode)
    result = described(model)
    assert result == expected and len(result) > 3
    assert all(value.fake_mode is mode for value in model.parameters() if isinstance(value, FakeTensor))


@pytest.mark.parametrize("container", [list, tuple, lambda items: {"a": (items[0],)}])
def test_tensors_in_a_container_are_left_to_a_build(container):
    with torch.device("meta"):
        model = nn.Sequential(Held())
        model[0].more = container([torch.ones(2)])
    assert not fake_weights.make_fake(model, FakeTensorMode())
    assert model[0].weight.is_meta and model[0].table.is_meta


@pytest.fixture
def thawed(monkeypatch):
    """A process that put nothing aside, as this one of the tests may have."""
    monkeypatch.setattr(collection, "_process_freezes", False)
    was_frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    yield
    (gc.freeze if was_frozen else gc.unfreeze)()


@pytest.mark.usefixtures("thawed")
def test_a_command_leaves_collection_as_it_was():
    with collection.of_command():
        with collection.paused():
            assert not gc.isenabled()
            kept = [[]]
        assert gc.isenabled() and gc.get_freeze_count() > 0 and kept
        gc.disable()
        with collection.paused():
            pass
        assert not gc.isenabled()
        gc.enable()
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("thawed")
def test_a_command_keeps_what_its_process_put_aside():
    gc.freeze()
    with collection.of_command(), collection.paused():
        pass
    assert gc.get_freeze_count() > 0


@pytest.mark.usefixtures("thawed")
def test_what_a_process_put_aside_is_counted_once(monkeypatch):
    gc.freeze()
    counted = []
    with monkeypatch.context() as patched:
        patched.setattr(gc, "get_freeze_count", lambda count=gc.get_freeze_count: counted.append(1) or count())
        for _ in range(3):
            with collection.of_command(), collection.paused():
                pass
    assert len(counted) == 1 and gc.get_freeze_count() > 0
