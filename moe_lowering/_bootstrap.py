"""Makes ``import torch`` possible on a machine that has torch_npu and no CANN; the package calls it before it imports torch.

There a plain ``import torch`` fails: torch loads the backend extension, which needs ``libhccl.so``. Turning the autoload of
extensions off is enough. It is only done where CANN is missing, so that a machine with an NPU keeps its normal behaviour.
Source: torch.import_backends: the entry points, tried with torch_npu 2.13.0.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def cann_is_installed() -> bool:
    """Whether the loader finds the CANN runtime (``libascendcl.so``)."""
    try:
        ctypes.CDLL("libascendcl.so")
    except OSError:
        return False
    return True


def disable_autoload_without_cann() -> None:
    """Let ``import torch`` succeed where torch_npu is installed and CANN is not. Does nothing once torch is imported."""
    if "torch._C" in sys.modules and "torch" not in sys.modules:
        raise ImportError(
            "moe_lowering: an earlier `import torch` failed in this process; start a new one and import moe_lowering "
            "before torch"
        )
    if "torch" in sys.modules or AUTOLOAD in os.environ:
        return
    if importlib.util.find_spec("torch_npu") is not None and not cann_is_installed():
        os.environ[AUTOLOAD] = "0"
