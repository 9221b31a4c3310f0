"""Hooks on the import of a module by name, in this process, whoever imports it.

- ``around``: a context manager that the module's code runs inside of.
- ``after``: a function that gets the module when its code has run.
- ``provide``: a module that no file holds.

A module that is reloaded (vllm-ascend reloads npugraph_ex's compiler) goes through its hooks again. Used by the plugin
of vLLM and by the simulator.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Given the module; None while an extension module is being created.
Around = Callable[[Any], contextlib.AbstractContextManager[None]]


def around(name: str, manager: Around) -> None:
    """Let a module's code run inside of ``manager(module)`` when it is imported from now on; a name's last manager counts."""
    _finder().around[name] = manager


def after(name: str, change: Callable[[Any], None]) -> None:
    """Call ``change(module)`` when a module has been imported; now, where it is, and at each reload."""

    @contextlib.contextmanager
    def manager(module: Any) -> Iterator[None]:
        yield
        change(module)

    around(name, manager)
    if name in sys.modules:
        change(sys.modules[name])


def provide(name: str, fill: Callable[[Any], None], is_package: bool = False) -> None:
    """Make a module that no file holds importable; ``fill(module)`` gives it its content."""
    _finder().provided[name] = (fill, is_package)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self.around = dict[str, Around]()
        self.provided = dict[str, tuple[Callable[[Any], None], bool]]()
        self._searching = set[str]()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name in self._searching:
            return None
        if name in self.provided:
            fill, is_package = self.provided[name]
            return importlib.machinery.ModuleSpec(name, _Provided(fill), is_package=is_package)
        if name not in self.around:
            return None
        self._searching.add(name)
        try:
            spec = _search(name, path, target)
        finally:
            self._searching.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Around(spec.loader, self.around[name])
        return spec


def _search(
    name: str, path: Sequence[str] | None, target: types.ModuleType | None
) -> importlib.machinery.ModuleSpec | None:
    """As the import system does, which ``importlib.util.find_spec`` does not for a module that is there: the reloaded one."""
    for finder in sys.meta_path:
        if (find := getattr(finder, "find_spec", None)) is not None and (spec := find(name, path, target)) is not None:
            found: importlib.machinery.ModuleSpec = spec
            return found
    return None


def _finder() -> _Finder:
    for finder in sys.meta_path:
        if isinstance(finder, _Finder):
            return finder
    sys.meta_path.insert(0, made := _Finder())
    return made


class _Provided(importlib.abc.Loader):
    def __init__(self, fill: Callable[[Any], None]) -> None:
        self._fill = fill

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        self._fill(module)


class _Around(importlib.abc.Loader):
    """The loader of a module, and what is done before and after the module's code runs."""

    def __init__(self, loader: importlib.abc.Loader, manager: Around) -> None:
        self._loader, self._manager = loader, manager

    def __getattr__(self, name: str) -> Any:  # what importlib.resources and others ask of a loader
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        if isinstance(self._loader, importlib.machinery.ExtensionFileLoader):  # loads its libraries here
            with self._manager(None):
                return self._loader.create_module(spec)
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        with self._manager(module):
            self._loader.exec_module(module)
