"""``identity``: a text for a user's callable, the same in every process, and another one when the callable computes otherwise.

A compile cache must tell two cost functions or pre-passes apart that differ in a closure, a default, an argument of a
partial, an attribute of an instance or its class, or a global only, and must find a nested function again in another
process, where it lies at another address. So written down are

- a function: its code, defaults, closure and attributes, and the globals that it reads; of a module it reads, those
  attributes that the code names;
- a class: what it and its bases define; annotations and docstrings are not read;
- an instance: its class, attributes and slots, and its items when its class is derived from a builtin container;
- what torch, torch_npu, numpy, Python's library and this package define: its name, as they change with their versions only.
  This package's code, and torch's version, are in the key elsewhere; the others' versions are not.

What cannot be written down in this way makes the text unique: such a cache entry is never found again, which costs a compile
and is never wrong. An object may say itself what it stands for: attribute ``cache_key``, a string.

Not seen is what a function reaches by a name made at run time (``globals()[name]``, ``getattr``) or through C code, and what
a value that torch, numpy or Python's library keep has been changed to.
"""

from __future__ import annotations

import collections
import dis
import enum
import functools
import importlib.util
import inspect
import logging
import reprlib
import sys
import sysconfig
import types
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented), range)
_PLAIN = frozenset((*_CONSTANTS, torch.dtype, torch.device, torch.layout, torch.memory_format))
# no cycle is made of these alone, and whether equal ones are one object differs between a fresh compile and a .pyc
_UNNUMBERED = (tuple, frozenset, types.CodeType, types.MethodType, types.ModuleType)
_DESCRIPTORS = (
    types.MemberDescriptorType,
    types.GetSetDescriptorType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
)
_BASES = (tuple, list, dict, set, frozenset, str, bytes, int, float, complex)
_OWN = (object, *_BASES)
_PACKAGES = ("builtins", "torch", "torch_npu", "numpy", "moe_lowering")
_LOADS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
# of a class: what says nothing about what it computes, or is written otherwise
_UNREAD = frozenset({
    "__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__orig_bases__", "__parameters__",
    "__firstlineno__", "__static_attributes__", "__annotations__", "__annotate__", "__annotate_func__",
    "__annotations_cache__", "__dataclass_fields__", "__dataclass_params__",
})  # fmt: skip
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made at run time, not a static type of C


class _Unknown(Exception):
    """A value that cannot be written down."""


def identity(value: Any) -> str:
    """The text for a callable, or for a value that one holds."""
    try:
        return _Writer({}).text(value)
    except _Unknown as unknown:
        what = unknown.args[0]
    except Exception:  # nested too deep, or an object whose attributes cannot be read
        what = value
    log.warning("moe_lowering: %s cannot be part of a cache key: its graphs are never found again", reprlib.repr(what))
    return f"unique({uuid.uuid4()})"


class _Writer:
    def __init__(self, visited: dict[Any, tuple[int, Any]]) -> None:
        self._seen = visited  # the values are kept, as the id of a freed one is used again

    def text(self, value: Any) -> str:
        key = getattr(value, "cache_key", None)
        if isinstance(key, str):
            return f"key({key!r})"
        if type(value) in _PLAIN:
            return f"{type(value).__name__}:{value!r}"
        if type(value) not in _UNNUMBERED:
            if id(value) in self._seen:  # a function that names itself, a list that holds itself
                return f"again:{self._seen[id(value)][0]}"
            self._seen[id(value)] = (len(self._seen), value)
        return self._callable(value) or self._named(value) or self._container(value) or self._object(value)

    def _callable(self, value: Any) -> str:
        if type(value) is functools.partial:
            return f"partial({self._all(value.func, value.args, value.keywords, vars(value))})"
        if isinstance(value, types.MethodType):
            return f"method({self._all(value.__func__, value.__self__)})"
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.CodeType):
            return self._code(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, functools._lru_cache_wrapper):
            return f"cached({self._all(value.__wrapped__, vars(value))})"
        if type(value) in (staticmethod, classmethod):
            return f"{type(value).__name__}({self._all(value.__func__)})"
        if type(value) is property:
            return f"property({self._all(value.fget, value.fset, value.fdel)})"
        if type(value) is functools.cached_property:
            return f"cached_property({self._all(value.func)})"
        if isinstance(value, (types.BuiltinFunctionType, types.MethodWrapperType)):
            owner = value.__self__
            if owner is None or isinstance(owner, types.ModuleType) or _by_name(value.__module__ or ""):
                return f"named({_name(value)})"
            return f"bound({value.__name__},{self._all(owner)})"
        return ""

    def _function(self, function: types.FunctionType) -> str:
        codes = _nested_codes(function.__code__)
        named = tuple(sorted({name for code in codes for name in code.co_names}))
        cells = ",".join(self._cell(cell, named) for cell in function.__closure__ or ())
        if _by_name(function.__globals__.get("__name__") or ""):  # not __module__, which functools.wraps copies
            return f"named({_name(function)},({cells}))"
        code = self._all(function.__code__, function.__defaults__, function.__kwdefaults__, vars(function))
        globals_ = ",".join(
            f"{name}={self._global(function.__globals__[name], named)}"
            for name in _global_names(function, codes)
            if name in function.__globals__
        )
        return f"function({_name(function)},{code},({cells}),({globals_}))"

    def _cell(self, cell: types.CellType, named: tuple[str, ...]) -> str:
        try:
            value = cell.cell_contents
        except ValueError:  # not yet filled
            return "empty"
        return self._global(value, named)

    def _global(self, value: Any, named: tuple[str, ...]) -> str:
        """What a global or a cell holds; of a module only what the code that reads it names."""
        if not isinstance(value, types.ModuleType) or _by_name(value.__name__):
            return self.text(value)
        key = (id(value), named)
        if key in self._seen:
            return f"again:{self._seen[key][0]}"
        self._seen[key] = (len(self._seen), value)
        members = [f"{name}={self._global(vars(value)[name], named)}" for name in named if name in vars(value)]
        return f"module({value.__name__},({','.join(members)}))"

    def _code(self, code: types.CodeType) -> str:
        counts = (code.co_flags, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        handlers = getattr(code, "co_exceptiontable", b"")  # from Python 3.11 on not in co_code
        return f"code({self._all(code.co_code, handlers, *names, counts, code.co_consts)})"

    def _class(self, kind: type) -> str:
        if not kind.__flags__ & _HEAP_TYPE or (_by_name(kind.__module__) and _is_importable(kind)):
            return f"named({_name(kind)})"
        members = self._pairs(
            (k, v) for k, v in vars(kind).items() if k not in _UNREAD and k != "_abc_impl" and not _of_enum(kind, k)
        )
        if issubclass(kind, enum.Enum):
            members += self._pairs((name, each.value) for name, each in kind.__members__.items())
        return f"class({_name(kind)},{self._all(type(kind), *kind.__bases__)},{members})"

    def _named(self, value: Any) -> str:
        """What does not compute anything, or is the same wherever it has this name."""
        if isinstance(value, types.ModuleType):
            if not _by_name(value.__name__):  # held by a value: which of its attributes are read is not known
                raise _Unknown(value)
            return f"named({value.__name__})"
        if isinstance(value, torch._ops.OpOverload):
            return f"named({_name(value)})"
        if isinstance(value, torch._ops.OpOverloadPacket):
            return f"named({value})"
        if isinstance(value, _DESCRIPTORS):
            return f"named({_name(value.__objclass__)},{value.__name__})"
        if type(value).__qualname__ == "_tuplegetter":  # a field of a named tuple, by its place
            return f"field({value.__reduce__()[1][0]})"
        if isinstance(value, logging.Logger):
            return f"logger({value.name!r})"
        if type(value).__module__ == "typing" or isinstance(value, (types.GenericAlias, types.UnionType)):
            return f"typing({value!r})"
        return ""

    def _container(self, value: Any) -> str:
        kind = type(value)
        if kind in (tuple, list, torch.Size):
            return f"{kind.__name__}({self._all(*value)})"
        if kind in (set, frozenset):
            return f"{kind.__name__}({self._all(*self._ordered(value))})"
        if kind in (dict, collections.OrderedDict, types.MappingProxyType, types.SimpleNamespace):
            return f"{kind.__name__}({self._pairs(_items(value))})"
        if kind is collections.defaultdict:
            return f"defaultdict({self._all(value.default_factory)},{self._pairs(value.items())})"
        if kind is slice:
            return f"slice({self._all(value.start, value.stop, value.step)})"
        if isinstance(value, enum.Enum):
            return f"enum({self._all(kind, value.name, value.value)})"
        return ""

    def _ordered(self, value: Iterable[Any]) -> list[Any]:
        """A set's members by their text: their order changes with the process."""
        return sorted(value, key=lambda each: _Writer(dict(self._seen)).text(each))

    def _object(self, value: Any) -> str:
        """An instance by its class and all that it holds."""
        kind = type(value)
        slots = _slots(kind)
        base: Any = next((each for each in _BASES if issubclass(kind, each)), object)
        if not _has_plain_reduce(kind) or _size(kind, base, len(slots)) < kind.__basicsize__:
            raise _Unknown(value)
        filled = []
        for slot in slots:
            try:
                filled.append((_name(slot.__objclass__), slot.__name__, slot.__get__(value, kind)))
            except AttributeError:
                continue
        return f"object({self._all(kind, _content(value, base), filled)},{self._pairs(_attributes(value).items())})"

    def _pairs(self, items: Iterable[tuple[Any, Any]]) -> str:
        return f"({','.join(f'{self.text(key)}={self.text(each)}' for key, each in items)})"

    def _all(self, *values: Any) -> str:
        return ",".join(self.text(value) for value in values)


@functools.cache
def _by_name(module: str) -> bool:
    """Whether what a module defines changes with a version only. A user's ``profile.py`` is not Python's."""
    top = module.partition(".")[0]
    if top in _PACKAGES:
        return True
    if top not in sys.stdlib_module_names:
        return False
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    if spec is None or spec.origin in (None, "built-in", "frozen"):
        return spec is not None
    file = Path(str(spec.origin))
    folders = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
    folders += [Path(folder).resolve() for folder in folders]
    outside = {"site-packages", "dist-packages"} & set(file.parts)
    return not outside and any(folder in file.parents for folder in folders)


def _is_importable(kind: type) -> bool:
    """Whether a class is what its module has under its name."""
    target: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        target = inspect.getattr_static(target, name, None)
    return target is kind


def _of_enum(kind: type, name: str) -> bool:
    """Whether an attribute of an enumeration is one that Python makes from its members."""
    if not issubclass(kind, enum.Enum):
        return False
    return name in kind.__members__ or (name[:1] == "_" == name[-1:] and name[:2] != "__")


def _has_plain_reduce(kind: type) -> bool:
    """Whether an instance is what its attributes say, as far as its class says."""
    return not any(
        "__reduce_ex__" in vars(each) or "__reduce__" in vars(each) for each in kind.__mro__ if each not in _OWN
    )


def _slots(kind: type) -> list[types.MemberDescriptorType]:
    written = [each for each in kind.__mro__ if "__slots__" in vars(each)]
    return [slot for each in written for slot in vars(each).values() if isinstance(slot, types.MemberDescriptorType)]


def _size(kind: type, base: type, slots: int) -> int:
    """What an instance needs for all that Python code can put there; a larger one has contents in C."""
    pointers = slots + sum(offset not in (0, -1) for offset in (kind.__dictoffset__, kind.__weakrefoffset__))
    return base.__basicsize__ + pointers * tuple.__itemsize__


def _content(value: Any, base: Any) -> Any:
    """What an instance of a class derived from a builtin holds as such."""
    if base is object:
        return None
    if base is dict:
        return list(dict.items(value))
    if base in (tuple, list, set, frozenset):
        return base(base.__iter__(value))
    return base.__getnewargs__(value)


def _attributes(value: Any) -> dict[str, Any]:
    try:
        attributes: dict[str, Any] = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return attributes


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    items: Iterable[tuple[Any, Any]] = (vars(value) if isinstance(value, types.SimpleNamespace) else value).items()
    return items


def _name(value: Any) -> str:
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or type(value).__qualname__
    return f"{getattr(value, '__module__', '')}.{name}"


def _nested_codes(code: types.CodeType) -> list[types.CodeType]:
    """A function's code and that of the functions inside of it."""
    return [
        code,
        *(inner for each in code.co_consts if isinstance(each, types.CodeType) for inner in _nested_codes(each)),
    ]


def _global_names(function: types.FunctionType, codes: list[types.CodeType]) -> list[str]:
    """The names of the globals that a function reads.

    Raises:
        _Unknown: it imports a module that may change with every edit.
    """
    names = set()
    for instruction in (each for code in codes for each in dis.get_instructions(code)):
        if instruction.opname in _LOADS:
            names.add(str(instruction.argval))
        if instruction.opname == "IMPORT_NAME" and not _by_name(str(instruction.argval)):
            raise _Unknown(function)
    return sorted(names)
