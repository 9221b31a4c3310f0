"""The real library of vllm-ascend, loaded on the simulator's stand-ins, and what it called. Run by ``make provider``.

These tests need an environment of their own (docs/provider.md), so they are not below ``tests``, and none of them is
skipped where the library is not there: all fail.
"""

import moe_lowering  # noqa: F401  # isort: skip
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import recorder
import torch

from moe_lowering import simulator
from moe_lowering.custom_ops import dispatch_ffn_combine, dispatch_gmm_combine_decode
from moe_lowering.custom_ops.library import bind_kernel

WRAPPERS: dict[Any, Any] = {  # and the records that their kernels take
    dispatch_ffn_combine: dispatch_ffn_combine.DispatchFfnCombineCall,
    dispatch_gmm_combine_decode: dispatch_gmm_combine_decode.DispatchGmmCombineDecodeCall,
}

pytest.register_assert_rewrite("entries")
# The layers that the default suite computes with
sys.path.append(str(Path(__file__).parent.parent / "tests" / "helpers"))
torch.set_num_threads(1)
simulator.enable_device("A3")
recorder.load()  # before the test modules ask which operators are there


@pytest.fixture(scope="session", autouse=True)
def device_kernels() -> Iterator[None]:
    """The wrappers' own kernels for the device: the simulator puts those for CPU in their place."""
    library: Any = torch.library.Library("moe_lowering", "IMPL")  # type: ignore[no-untyped-call]
    for module, call in WRAPPERS.items():
        kernel = bind_kernel(module.SCHEMA, module._npu, call)
        library.impl(module.NAME, kernel, "PrivateUse1", allow_override=True)
    yield
    library._destroy()


@pytest.fixture(autouse=True)
def nothing_recorded() -> None:
    recorder.taken()
