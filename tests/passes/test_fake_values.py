"""Copies of fake values, and what happens on a torch whose FakeTensor keeps more than is copied."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._mode_utils import no_dispatch

from moe_lowering import simulator
from moe_lowering.passes.emission import fake_values
from moe_lowering.passes.emission.fake_values import Template

simulator.enable()


@pytest.fixture
def fresh():
    """The question is asked anew, before and after."""
    fake_values._copies_are_whole.cache_clear()
    yield
    fake_values._copies_are_whole.cache_clear()


def _value() -> FakeTensor:
    with FakeTensorMode():
        return torch.empty(4, 6, dtype=torch.bfloat16).t()


def _kept_in_a_slot():
    class Slotted(FakeTensor):
        __slots__ = ("origin",)

        @staticmethod
        def __new__(cls, *args, **kwargs):
            self = FakeTensor.__new__(cls, *args, **kwargs)
            self.origin = "constructor"
            return self

    return Slotted


def _kept_in_c_plus_plus():
    class Graded(FakeTensor):
        @staticmethod
        def __new__(cls, mode, elem, device):
            return FakeTensor.__new__(cls, mode, elem.requires_grad_(True), device)

    return Graded


def _of_other_dispatch_keys():
    class Elsewhere(FakeTensor):
        @staticmethod
        def __new__(cls, mode, elem, device):
            return FakeTensor.__new__(cls, mode, elem, torch.device("meta" if mode.allow_meta else "xla:0"))

    return Elsewhere


def test_this_torch_copies(fresh):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy = Template.of(value := _value()).copy()
    assert fake_values._copies_are_whole()
    assert (copy.shape, copy.stride(), copy.dtype, copy.device) == (
        value.shape, value.stride(), value.dtype, value.device,
    )  # fmt: skip
    assert copy.untyped_storage()._cdata != value.untyped_storage()._cdata


@pytest.mark.parametrize("whole", [True, False])
def test_each_call_of_a_copier_makes_what_copy_makes(fresh, monkeypatch, whole):
    """Also where the constructor has to make the copies."""
    monkeypatch.setattr(fake_values, "_copies_are_whole", lambda: whole)
    template = Template.of(value := _value())
    copier = template.copier()
    with no_dispatch():
        copies = [template.copy(), copier(), copier()]
    described = [(*_described(copy), sorted(vars(copy).items(), key=str)) for copy in copies]
    assert described == described[:1] * 3
    assert _described(copies[1]) == _described(value)
    assert len({each.untyped_storage()._cdata for each in (value, *copies)}) == 4
    assert len({id(vars(each)) for each in (value, *copies)}) == 4


def _described(value):
    return (type(value), value.shape, value.stride(), value.dtype, value.device, value.fake_mode)


@pytest.mark.parametrize(
    ("twin", "lost"),
    [
        (_kept_in_a_slot, "slot origin"),
        (_kept_in_c_plus_plus, "requires_grad"),
        (_of_other_dispatch_keys, "dispatch keys"),
    ],
)
def test_state_outside_of_dict_makes_the_constructor_take_over(fresh, monkeypatch, twin, lost):
    monkeypatch.setattr(fake_values, "FakeTensor", twin())
    template = Template.of(_value())
    with pytest.warns(RuntimeWarning, match=f"slower: copies lack .*{lost}") as caught:
        copies = [template.copy(), template.copy()]
    assert len(caught) == 1
    assert all(type(copy) is fake_values.FakeTensor for copy in copies)
    assert getattr(copies[1], "origin", "constructor") == "constructor"


def test_what_torch_took_away_makes_the_constructor_take_over(fresh, monkeypatch):
    monkeypatch.setattr(fake_values, "_copy_state", lambda meta, device, state: state["gone"])
    template = Template.of(_value())
    with pytest.warns(RuntimeWarning, match="slower: copies lack KeyError: 'gone'"):
        copy = template.copy()
    assert (type(copy), copy.shape, copy.device) == (FakeTensor, (6, 4), torch.device("cpu"))


# What views of a value differ in, and what none of them has.
LAYOUTS = {
    "as it is": lambda x: x.view(x.shape),
    "a part": lambda x: x[1:, 2:],
    "transposed": lambda x: x.t(),
    "spread": lambda x: x.unsqueeze(0).expand(3, -1, -1),
    "of another dtype": lambda x: x.view(torch.float16),
}


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("device", ["cpu", "npu:0"])
def test_a_viewer_makes_what_view_makes(layout, symbolic, device):
    """On another value of the same metadata: its storage, version and all that is told of a tensor."""
    mode = FakeTensorMode(shape_env=ShapeEnv() if symbolic else None)
    with no_dispatch():
        real = [torch.empty(4, 6, dtype=torch.bfloat16, device="meta") for _ in range(2)]
    with mode:
        first, other = (
            mode.from_tensor(each) if symbolic else torch.empty(4, 6, dtype=torch.bfloat16, device=device)
            for each in real
        )
        expected = LAYOUTS[layout](first)
    template, guards = Template.of(expected), len(mode.shape_env.guards) if symbolic else 0
    assert template.symbolic == symbolic
    viewer = template.viewer(first)
    with no_dispatch():
        made = viewer(other)
    reference = template.view(other)
    if layout == "as it is":
        assert viewer.args[0] is None, "its layout was taken for another one"
    assert not symbolic or len(mode.shape_env.guards) == guards, "a guard was added"
    assert fake_values._differences(made, reference) == []
    for each in (made, reference):
        assert each.untyped_storage()._cdata == other.untyped_storage()._cdata != first.untyped_storage()._cdata
        assert each._base is None
    assert vars(made) is not vars(other)
    with mode:
        other.add_(1)
    assert made._version == reference._version == other._version == 1


def _moved(base):
    return torch.empty(6, dtype=base.dtype, device="meta")


@pytest.mark.parametrize(
    ("other", "lost"),
    [(_moved, "the storage of views"), (lambda base: base.gone, "AttributeError")],
    ids=["moved", "gone"],
)
def test_views_that_torch_makes_otherwise_make_the_constructor_take_over(fresh, monkeypatch, other, lost):
    """The twin: with torch's own ``detach`` no warning is given."""
    assert fake_values._copies_are_whole()
    fake_values._copies_are_whole.cache_clear()
    monkeypatch.setattr(fake_values, "_detach", other)
    value = _value()
    with pytest.warns(RuntimeWarning, match=f"slower: copies lack .*{lost}"):
        view = Template.of(value).viewer(value)(value)
    assert view.untyped_storage()._cdata == value.untyped_storage()._cdata
