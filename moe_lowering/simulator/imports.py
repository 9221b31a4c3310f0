"""The simulator behind ``import torch_npu``, in programs that know nothing of it and in the processes that they start.

``moe-lowering simulate -- python serve.py`` runs a program with the variable ``MOE_LOWERING_SIMULATOR`` (a SoC) and the folder
``startup`` on PYTHONPATH; each Python process then calls ``install``. Nothing is imported for it: a process that never imports
torch_npu pays nothing. What happens at which import stands in ``AROUND`` and ``MADE``.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_lowering import simulator
from moe_lowering.simulator import SimulatorError, state
from moe_lowering.vocabulary import SOCS

# Given the module (None while an extension module is being created) and the SoC.
Around = Callable[[Any, str], contextlib.AbstractContextManager[None]]

VARIABLE = "MOE_LOWERING_SIMULATOR"
STARTUP = Path(__file__).resolve().parent / "startup"


def environment(soc: str, inherited: dict[str, str]) -> dict[str, str]:
    """The variables with which a program and the processes that it starts run on the simulator.

    Raises:
        SimulatorError: an unknown SoC.
    """
    _check(soc)
    others = [
        folder for folder in inherited.get("PYTHONPATH", "").split(os.pathsep) if folder and folder != str(STARTUP)
    ]
    return {**inherited, VARIABLE: soc, "PYTHONPATH": os.pathsep.join([str(STARTUP), *others])}


def install(soc: str) -> None:
    """Let this process enable the simulator when it imports torch_npu. A second call does nothing.

    Raises:
        SimulatorError: an unknown SoC.
    """
    _check(soc)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(soc))


def _check(soc: str) -> None:
    if soc not in SOCS:
        raise SimulatorError(f"{VARIABLE} is {soc!r}; accepted: {', '.join(SOCS)}")


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, soc: str) -> None:
        self.soc = soc
        self._searching = set[str]()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name in self._searching:
            return None
        if name in MADE:
            return importlib.machinery.ModuleSpec(name, _Made(MADE[name]), is_package=name in PACKAGES)
        if name not in AROUND:
            return None
        self._searching.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Around(spec.loader, AROUND[name], self.soc)
        return spec


class _Made(importlib.abc.Loader):
    """Makes a module that no file holds."""

    def __init__(self, fill: Callable[[Any], None]) -> None:
        self._fill = fill

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        self._fill(module)


class _Around(importlib.abc.Loader):
    """The loader of a module, and what is done before and after the module's code runs."""

    def __init__(self, loader: importlib.abc.Loader, around: Around, soc: str) -> None:
        self._loader, self._around, self._soc = loader, around, soc

    def __getattr__(self, name: str) -> Any:  # what importlib.resources and others ask of a loader
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        with self._around(None, self._soc) if _makes_at_creation(spec) else contextlib.nullcontext():
            return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        with self._around(module, self._soc):
            self._loader.exec_module(module)


@contextlib.contextmanager
def _enable(module: Any, soc: str) -> Iterator[None]:
    if state.loaded is not None:  # enable() is what imports torch_npu
        yield
        return
    simulator.load(soc)
    with simulator.without_noise():
        yield
    simulator.enable_device(soc)


@contextlib.contextmanager
def _with_operators(module: Any, soc: str) -> Iterator[None]:
    from moe_lowering.simulator import vllm_ascend

    vllm_ascend.load_libraries()
    yield
    if module is not None:
        vllm_ascend.register_kernels()


@contextlib.contextmanager
def _as_device(module: Any, soc: str) -> Iterator[None]:
    """A wheel is built for one SoC, which vllm-ascend compares with the device's: its Python serves all of them."""
    yield
    module.__device_type__ = {"310P": "_310P"}.get(soc, soc)


@contextlib.contextmanager
def _without_triton(module: Any, soc: str) -> Iterator[None]:
    from moe_lowering.simulator import vllm_ascend

    yield
    module._compute_slot_mapping_kernel = vllm_ascend.SlotMapping()


def _makes_at_creation(spec: importlib.machinery.ModuleSpec) -> bool:
    """Whether a module's libraries are loaded when it is created: extension modules."""
    return isinstance(spec.loader, _Around) and isinstance(spec.loader._loader, importlib.machinery.ExtensionFileLoader)


def _fill_acl(module: Any) -> None:
    """CANN's Python binding, as far as vllm-ascend asks for it."""
    module.get_soc_name = lambda: SOCS[state.soc()].runtime_name


def _fill_acl_rt(module: Any) -> None:
    def memcpy(*arguments: Any) -> int:
        raise SimulatorError("acl.rt.memcpy is not simulated (vllm-ascend's sleep mode asks for it)")

    module.memcpy = memcpy


AROUND: dict[str, Around] = {
    "torch_npu": _enable,
    "vllm_ascend.vllm_ascend_C": _with_operators,
    "vllm_ascend._build_info": _as_device,
    "vllm.v1.worker.block_table": _without_triton,
}
MADE: dict[str, Callable[[Any], None]] = {"acl": _fill_acl, "acl.rt": _fill_acl_rt}
PACKAGES = {"acl"}
