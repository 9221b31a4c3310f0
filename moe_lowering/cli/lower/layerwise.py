"""Lower one layer of each kind in place of a whole model: what ``lower --fake`` does unless ``--whole`` is given.

1. A unit is an entry of a list of modules that holds MoE modules: a decoder layer. Two units are of one kind where
   nothing that can be seen differs, except the index of the layer: classes, names, shapes and dtypes of tensors,
   settings.
2. The model runs under fake tensors, without dynamo, until the first unit of every kind has been called; the arguments
   of these calls are kept.
3. The first unit of each kind is traced and lowered alone with its arguments, as ``layer.compile()`` would do it. Its
   report stands for all units of its kind.

Nothing is guessed: where a model has no such units, or cannot be run so, the caller (``fake``) says why and traces the
whole graph. What is in no unit (embedding, head, layers without experts) is not looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moe_lowering.integrations.transformers import capabilities
from moe_lowering.report.records import LoweringReport

# Settings that say which layer of the model a module is in
INDICES = frozenset({"layer_idx", "layer_index", "layer_id", "idx", "index"})
_PLAIN = (int, float, str, bool, type(None), torch.dtype)


class _Enough(Exception):
    """Ends the run when the inputs of every kind of unit are known."""


@dataclasses.dataclass(frozen=True)
class UnitKind:
    """Units that are equal: their names, in order, and the module of the first."""

    names: tuple[str, ...]
    module: nn.Module


@dataclasses.dataclass(frozen=True)
class UnitCall:
    """What a unit is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def of(self, unit: Any) -> Any:
        """This call of a unit, which may be compiled."""
        return unit(*self.args, **self.kwargs)


class Alone(nn.Module):
    """A unit as a model of its own, in which it has a path as it has one in the whole model."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.unit(*args, **kwargs)


def unit_kinds(model: nn.Module) -> list[UnitKind]:
    """The kinds of units of a model, each in the order of its first; empty where an MoE module is in no list."""
    units: dict[str, None] = {}
    for name, *_ in capabilities(model):
        unit = _unit_of(name)
        if unit is None:
            return []
        units[unit] = None
    kinds: dict[Any, list[str]] = {}
    for unit in units:
        kinds.setdefault(describe_module(model.get_submodule(unit)), []).append(unit)
    return [UnitKind(tuple(names), model.get_submodule(names[0])) for names in kinds.values()]


def _unit_of(name: str) -> str | None:
    """``model.layers.3`` of ``model.layers.3.mlp.experts``."""
    parts = name.split(".")
    at = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    return None if at is None else ".".join(parts[: at + 1])


def describe_module(module: nn.Module) -> tuple[Any, ...]:
    """All that can be seen of a module and those in it, but for which layer it is; hashable."""
    lines: list[Any] = []
    for name, each in module.named_modules():
        tensors = [*each.named_parameters(recurse=False), *each.named_buffers(recurse=False)]
        facts = tuple((key, tuple(t.shape), t.stride(), t.dtype) for key, t in tensors)
        lines.append((name, type(each), each.extra_repr(), facts, _settings(each)))
    return tuple(lines)


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Its own attributes: plain values as they are, tensors (not registered as such) by shape, of others the kind, and the
    object itself where it may be told apart, such as a config that all layers share."""
    settings: list[Any] = []
    for name, value in sorted(vars(module).items()):
        if name in INDICES or (name in _OF_MODULE and not (name.endswith("hooks") and value)):
            continue
        if isinstance(value, _PLAIN):
            settings.append((name, type(value), value))
        elif isinstance(value, torch.Tensor):
            settings.append((name, tuple(value.shape), value.dtype))
        elif isinstance(value, (list, tuple)) and all(isinstance(item, _PLAIN) for item in value):
            settings.append((name, type(value), tuple(value)))
        elif isinstance(value, dict) and not value:
            settings.append((name, dict))
        else:
            settings.append((name, type(value), id(value)))
    return tuple(settings)


_OF_MODULE = frozenset(vars(nn.Module()))


def calls_of(kinds: list[UnitKind], run: Callable[[], Any]) -> dict[str, UnitCall]:
    """What the first unit of each kind is called with, by its name, when ``run`` runs the model.

    Raises:
        Exception: what the model raises.
    """
    calls: dict[str, UnitCall] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(name, UnitCall(args, dict(kwargs)))
            if len(calls) == len(kinds):
                raise _Enough

        return hook

    handles = [kind.module.register_forward_pre_hook(keep(kind.names[0]), with_kwargs=True) for kind in kinds]
    try:
        with torch.no_grad():
            run()
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return calls


def spread(kinds: list[UnitKind], reports: list[LoweringReport]) -> LoweringReport:
    """One report in place of those of the first of each kind: the blocks of every unit, in the order of the model, and the
    nodes of the graphs that were traced."""
    units = sorted(
        ((unit, report) for kind, report in zip(kinds, reports, strict=True) for unit in kind.names),
        key=lambda pair: _order(pair[0]),
    )
    return dataclasses.replace(
        reports[0],
        blocks=tuple(_placed(unit, each, "name") for unit, report in units for each in report.blocks),
        unrecognised=tuple((_inside(unit, place), why) for unit, report in units for place, why in report.unrecognised),
        nodes_before=sum(report.nodes_before for report in reports),
        nodes_after=sum(report.nodes_after for report in reports),
        pass_ms=sum(report.pass_ms for report in reports),
        not_capturable=tuple(_placed(unit, each, "place") for unit, report in units for each in report.not_capturable),
        foreign=tuple(_placed(unit, each, "place") for unit, report in units for each in report.foreign),
        routers=tuple(_placed(unit, each, "place") for unit, report in units for each in report.routers),
    )


def _placed(unit: str, record: Any, field: str) -> Any:
    """A record of something in a unit, with its place in the model."""
    return dataclasses.replace(record, **{field: _inside(unit, getattr(record, field))})


def _inside(unit: str, place: str) -> str:
    """The place in the model of one in ``Alone``; what is no path there, such as the name of a node, stays beside it."""
    first, _, rest = place.partition(".")
    if first != "unit":
        return f"{unit}: {place}"
    return f"{unit}.{rest}" if rest else unit


def _order(unit: str) -> tuple[Any, ...]:
    """``model.layers.10`` after ``model.layers.9``."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in unit.split("."))


def describe_kinds(kinds: list[UnitKind]) -> str:
    """For the report: what was lowered for what."""
    return "; ".join(map(describe_kind, kinds))


def describe_kind(kind: UnitKind) -> str:
    """The unit that stands for the others, and how many they are."""
    more = f" for {len(kind.names)} equal layers up to {kind.names[-1]}" if len(kind.names) > 1 else ""
    return f"{kind.names[0]}{more}"
