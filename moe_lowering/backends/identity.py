"""What a callable of the user's computes, as text that is the same in every process and differs when the callable does.

A compile cache must tell two cost functions or pre-passes apart that differ in a closure, a default, an argument of a
partial or an attribute of an instance only, and must find a nested function again in another process, where it lies at
another address. What cannot be written down in this way makes the text unique: such a cache entry is never found again,
which costs a compile and is never wrong. An object may say itself what it stands for: attribute ``cache_key``, a string.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import logging
import types
import uuid
from typing import Any

import torch

log = logging.getLogger(__name__)
_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)


def identity(value: Any) -> str:
    """The text for a callable, or for a value that one holds."""
    return _Writer().text(value)


class _Writer:
    def __init__(self) -> None:
        self._seen: dict[int, int] = {}

    def text(self, value: Any) -> str:
        key = getattr(value, "cache_key", None)
        if isinstance(key, str):
            return f"key({key!r})"
        if isinstance(value, _PLAIN):
            return f"{type(value).__name__}:{value!r}"
        if id(value) in self._seen:  # a function that names itself, a list that holds itself
            return f"again:{self._seen[id(value)]}"
        self._seen[id(value)] = len(self._seen)
        return self._callable(value) or self._container(value) or self._object(value)

    def _callable(self, value: Any) -> str:
        if isinstance(value, functools.partial):
            return f"partial({self._all(value.func, value.args, value.keywords)})"
        if isinstance(value, types.MethodType):
            return f"method({self._all(value.__func__, value.__self__)})"
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.CodeType):
            parts = (value.co_code, value.co_names, value.co_varnames, value.co_freevars, value.co_consts)
            return f"code({self._all(*parts)})"
        if isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType, torch._ops.OpOverload)):
            return f"named({_name(value)})"
        return ""

    def _function(self, function: types.FunctionType) -> str:
        if function.__module__.partition(".")[0] == "moe_lowering":
            return f"named({_name(function)})"  # its code is hashed with the package's
        cells = [_content(cell) for cell in function.__closure__ or ()]
        globals_ = [self._global(function, name) for name in _names(function.__code__)]
        held = self._all(function.__code__, function.__defaults__, function.__kwdefaults__, cells)
        return f"function({_name(function)},{held},{globals_})"

    def _global(self, function: types.FunctionType, name: str) -> str:
        """A global that the code may read: what it holds when it is plain or written beside the function, else its name."""
        if name not in function.__globals__:
            return ""
        value = function.__globals__[name]
        beside = getattr(value, "__module__", None) == function.__module__
        plain = isinstance(value, (*_PLAIN, tuple, list, dict, set, frozenset))
        return f"{name}={self.text(value)}" if plain or beside else f"{name}={_name(value)}"

    def _container(self, value: Any) -> str:
        if isinstance(value, (tuple, list)):
            return f"{type(value).__name__}({self._all(*value)})"
        if isinstance(value, (set, frozenset)):
            return f"set({sorted(_Writer().text(each) for each in value)})"
        if isinstance(value, dict):
            return f"dict({[(self.text(key), self.text(each)) for key, each in value.items()]})"
        return ""

    def _object(self, value: Any) -> str:
        """An instance by its class, the code of its call, and what it holds."""
        if dataclasses.is_dataclass(value):
            held = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        elif _plainly_reduced(type(value)) and hasattr(value, "__dict__"):
            held = vars(value)
        else:
            log.warning("moe_lowering: %r cannot be part of a cache key: its graphs are never found again", value)
            return f"unique({uuid.uuid4()})"
        call = inspect.getattr_static(type(value), "__call__", None)
        return f"object({_name(type(value))},{self._all(held, call)})"

    def _all(self, *values: Any) -> str:
        return ",".join(self.text(value) for value in values)


def _plainly_reduced(kind: type) -> bool:
    """Whether all that an instance holds is in its ``__dict__``, as far as its class says."""
    return not any("__reduce_ex__" in vars(each) or "__reduce__" in vars(each) for each in kind.__mro__[:-1])


def _name(value: Any) -> str:
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or type(value).__qualname__
    return f"{getattr(value, '__module__', '')}.{name}"


def _names(code: types.CodeType) -> list[str]:
    """Every global name that a function and the functions inside of it may read."""
    inner = [name for each in code.co_consts if isinstance(each, types.CodeType) for name in _names(each)]
    return sorted({*code.co_names, *inner})


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None
