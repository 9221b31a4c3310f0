"""The simulator behind ``import torch_npu``, in programs that know nothing of it and in the processes that they start.

``moe-lowering simulate -- python serve.py`` runs a program with the variable ``MOE_LOWERING_SIMULATOR`` (a SoC) and the
folder ``startup`` on PYTHONPATH. Its ``sitecustomize`` calls ``install`` in each Python process, which only sets import
hooks: a process that never imports torch_npu pays nothing. ``AROUND`` and ``PROVIDED`` say what is done at the import
of which module.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moe_lowering import import_hooks, simulator
from moe_lowering.simulator import SimulatorError, state
from moe_lowering.simulator.state import VARIABLE
from moe_lowering.vocabulary import SOCS

# Given the SoC and the module.
Around = Callable[[str, Any], contextlib.AbstractContextManager[None]]

DEVICES = "MOE_LOWERING_SIMULATOR_DEVICES"  # read by runtime.c
STARTUP = Path(__file__).resolve().parent / "startup"


def environment(soc: str, inherited: dict[str, str], devices: int = 1) -> dict[str, str]:
    """The variables with which a program and the processes that it starts run on the simulator, on a machine of so many devices.

    Raises:
        SimulatorError: an unknown SoC.
    """
    _check(soc)
    others = [
        folder for folder in inherited.get("PYTHONPATH", "").split(os.pathsep) if folder and folder != str(STARTUP)
    ]
    return {**inherited, VARIABLE: soc, DEVICES: str(devices), "PYTHONPATH": os.pathsep.join([str(STARTUP), *others])}


def install(soc: str) -> None:
    """Let this process enable the simulator when it imports torch_npu. A second call does nothing.

    Raises:
        SimulatorError: an unknown SoC.
    """
    _check(soc)
    for name, manager in AROUND.items():
        import_hooks.around(name, functools.partial(manager, soc))
    for name, fill in PROVIDED.items():
        import_hooks.provide(name, fill, is_package=name in PACKAGES)


def _check(soc: str) -> None:
    if soc not in SOCS:
        raise SimulatorError(f"{VARIABLE} is {soc!r}; accepted: {', '.join(SOCS)}")


@contextlib.contextmanager
def _enable(soc: str, module: Any) -> Iterator[None]:
    if state.loaded is not None:  # enable() is what imports torch_npu
        yield
        return
    simulator.load(soc)
    with simulator.without_noise():
        yield
    simulator.enable_device(soc)


@contextlib.contextmanager
def _with_operators(soc: str, module: Any) -> Iterator[None]:
    from moe_lowering.simulator import vllm_ascend

    vllm_ascend.load_libraries()
    yield
    if module is not None:
        vllm_ascend.register_kernels()


@contextlib.contextmanager
def _as_device(soc: str, module: Any) -> Iterator[None]:
    """A wheel is built for one SoC, which vllm-ascend compares with the device's: its Python serves all of them."""
    yield
    *_, module.__device_type__ = soc, *SOCS[soc].device_types  # the last of vllm-ascend's words is today's


@contextlib.contextmanager
def _without_triton(soc: str, module: Any) -> Iterator[None]:
    from moe_lowering.simulator import vllm_ascend

    yield
    module._compute_slot_mapping_kernel = vllm_ascend.SlotMapping()


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
PROVIDED: dict[str, Callable[[Any], None]] = {"acl": _fill_acl, "acl.rt": _fill_acl_rt}
PACKAGES = {"acl"}
