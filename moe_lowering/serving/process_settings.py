"""Settings of the process that compiled code is guarded on, as they were when a server was made.

Dynamo checks the number of threads, the default dtype and the inference mode before each run of a compiled function (torch
2.13.0, torch/csrc/dynamo/guards.cpp, GlobalStateGuard), and compiles again when one has changed. Nothing of that may happen
after warm-up, so a server runs under its own: whoever else changes them in the process, between or around its steps.
"""

from __future__ import annotations

import contextlib
from types import TracebackType

import torch


class Settings:
    """The settings of now; while it is entered they hold, and those of the caller after it. Not for several threads."""

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self.dtype = torch.get_default_dtype()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
            if threads != self.threads:
                torch.set_num_threads(self.threads)
                stack.callback(torch.set_num_threads, threads)
            if dtype != self.dtype:
                torch.set_default_dtype(self.dtype)
                stack.callback(torch.set_default_dtype, dtype)
            self._stack = stack.pop_all()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
