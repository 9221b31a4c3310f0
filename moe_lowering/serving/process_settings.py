"""``Settings``: the process-wide settings that dynamo guards compiled code on; a server restores its own around each step.

Dynamo checks these before each run of a compiled function (torch 2.13.0, torch/csrc/dynamo/guards.cpp, GlobalStateGuard and
AutocastState), and compiles again when one has changed. Nothing of that may happen after warm-up, so a server runs under its
own: whoever else changes them in the process, between or around its steps. Not held: function modes, so the default device
(``torch.set_default_device``), and what only CUDA reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

_Deterministic = tuple[bool, bool]
_Autocast = tuple[tuple[str, bool, torch.dtype], ...]


def _deterministic() -> _Deterministic:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set_deterministic(value: _Deterministic) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


def _autocast() -> _Autocast:
    devices = ("cpu", "npu") if hasattr(torch, "npu") else ("cpu",)
    return tuple((name, torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in devices)


def _set_autocast(value: _Autocast) -> None:
    for name, enabled, dtype in value:
        torch.set_autocast_enabled(name, enabled)
        torch.set_autocast_dtype(name, dtype)


_HELD: tuple[tuple[Callable[[], Any], Callable[[Any], None]], ...] = (
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (_deterministic, _set_deterministic),
    (_autocast, _set_autocast),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
)


class Settings:
    """The settings of the moment at which it is made. While it is entered they hold; at the end the caller's are
    restored. Not for several threads."""

    def __init__(self) -> None:
        self._values = [read() for read, _ in _HELD]
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            for (read, write), value in zip(_HELD, self._values, strict=True):
                before = read()
                if before != value:
                    stack.callback(write, before)
                    write(value)
            self._stack = stack.pop_all()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
