"""The real torch_npu wheel and its npugraph_ex backend on a machine that has no NPU and no CANN.

    import moe_lowering.simulator; moe_lowering.simulator.enable()  # "A3" unless another SoC is named

as the first line of a script, or anywhere after it as long as moe_lowering is imported before torch: torch fails to
import where torch_npu is installed without CANN, unless its autoload is off (see ``_bootstrap``). No environment
variable is needed. After it, ``torch_npu`` is imported, all ``torch.ops.npu.*`` schemas and meta functions are there,
the MoE operators of ``npu::`` have CPU kernels, and ``torch.compile(f, backend="npugraph_ex",
options={"force_eager": True})`` compiles and runs on CPU tensors. Tensors can be moved to device "npu", whose memory is
host memory, but nothing computes there: an operator on them raises, until ``enable_device()`` is called.

Importing this module adds nothing to what ``import moe_lowering`` costs: torch_npu is imported by ``enable()``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import re
import threading
from collections.abc import Iterator

from moe_lowering import _bootstrap, _versions
from moe_lowering.interrupts import postponed
from moe_lowering.simulator import standins, state
from moe_lowering.simulator.standins import SimulatorError
from moe_lowering.simulator.state import is_enabled, soc
from moe_lowering.stray_output import silence_torch_npu
from moe_lowering.vocabulary import SOCS

__all__ = ["SimulatorError", "enable", "enable_device", "is_enabled", "prepare", "soc"]

# What torch_npu (numpy, yaml) and npugraph_ex (packaging) import and the wheel does not declare.
REQUIRED = {"torch": "torch", "torch_npu": "torch-npu", "numpy": "numpy", "yaml": "pyyaml", "packaging": "packaging"}

# Printed by torch_npu's _cann_package_check on every machine without CANN; 2.10 writes "Warning :".
EXPECTED_NOISE = re.compile(r"Warning ?: ASCEND_HOME_PATH environment variable is not set\.")

_lock = threading.RLock()
_import_error = ""  # the first failure of `import torch_npu` in this process


def enable(soc: str = "A3") -> None:
    """Make torch_npu and npugraph_ex usable in this process, as if on a machine with one NPU of ``soc``.

    Builds its libraries on first use (about a second), with a C compiler and nm; see ``standins``. Call it in every
    process that needs it, spawned ones too. A second call does nothing. After an error the call can be repeated, but
    for one case that the message names: an import of torch_npu that failed in the middle.

    Args:
        soc: ``A2``, ``A3``, ``A5`` or ``310P``.

    Raises:
        SimulatorError: an unknown SoC; another SoC than the one enabled before; CANN is installed; a package, the C
            compiler or nm is missing; a CUDA build of torch that torch_npu collides with; torch_npu does not import.
    """
    with _lock:
        _check_soc(soc)
        if state.enabled:
            return
        load(soc)
        _versions.warn_if_untested()
        _import_torch_npu()
        silence_torch_npu()
        _register_kernels()
        state.enabled = True


def load(soc: str) -> None:
    """The first half of ``enable()``: after it torch_npu can be imported. For ``simulator.imports``, which is told of an import
    that has begun."""
    with _lock:
        _check_soc(soc)
        if state.loaded is None:
            _check_machine()
        libraries = standins.build_libraries()
        state.loaded = soc  # before loading: a load that fails half-way leaves libraries that look like CANN to a retry
        standins.load(libraries, SOCS[soc].runtime_name)
        _set_environment()


def prepare(soc: str = "A3") -> None:
    """Do what ``enable(soc)`` needs once per machine, so that processes that start together find it done. Imports no torch.

    Raises:
        SimulatorError: as ``enable()``, as far as it can be known without importing torch_npu.
    """
    _check_soc(soc)
    if state.loaded is None:
        _check_machine()
    standins.build_libraries()


def enable_device(soc: str | None = None) -> None:
    """``enable()``, and make device "npu" compute and capture; see ``moe_lowering.simulator.device``.

    A second call does nothing; it can follow an ``enable()``. Call it in every process that needs it.

    Args:
        soc: as for ``enable()``; None for the one that is enabled, else ``A3``.

    Raises:
        SimulatorError: as ``enable()``.
    """
    with _lock:
        enable(soc or state.loaded or "A3")
        from moe_lowering.simulator import device

        device.install()


def _check_soc(soc: str) -> None:
    if soc not in SOCS:
        raise SimulatorError(f"unknown SoC {soc!r}; accepted: {', '.join(SOCS)}")
    if state.loaded is not None and state.loaded != soc:
        raise SimulatorError(
            f"this process simulates {state.loaded} and cannot change to {soc}: torch_npu reads the SoC once; "
            f"use one process per SoC"
        )


def _check_machine() -> None:
    """Everything that can be known to fail before the process is changed."""
    missing = [package for module, package in REQUIRED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise SimulatorError(
            f"{', '.join(missing)} is not installed; get it with: pip install 'moe-lowering[npu]' "
            f"(torch_npu pins torch: install the torch of the same version first)"
        )
    if _bootstrap.cann_is_installed():  # our own libraries are not loaded yet, so this is not fooled by them
        raise SimulatorError(
            "this machine has CANN (libascendcl.so is found); the simulator would shadow it. "
            "Use torch_npu directly, or hide CANN from LD_LIBRARY_PATH"
        )
    if collision := _versions.cuda_collision():
        raise SimulatorError(collision)


def _set_environment() -> None:
    # torch_npu restores what it finds here when it is imported; "0" lets the children of this process, which have no
    # stand-ins when they start, import torch. Those of `moe-lowering simulate` have them: ranks that torchrun starts find
    # what it was told.
    if state.VARIABLE not in os.environ:
        os.environ[_bootstrap.AUTOLOAD] = "0"
    # An operator that fails in torch_npu's launch thread raises later or never, and what follows reads memory that was
    # not written (tried: a cast after a failed add gave garbage, an event never completed). Launch in the caller.
    os.environ["TASK_QUEUE_ENABLE"] = "0"


def _import_torch_npu() -> None:
    global _import_error
    try:
        # an error that a signal raises within the import of torch_npu._C aborts the process (std::terminate)
        with postponed(), without_noise():
            importlib.import_module("torch_npu")
    except Exception as error:
        # A second try can succeed (a missing package) or trip over what the first one registered: keep the first cause.
        _import_error = _import_error or f"{type(error).__name__}: {error}"
        versions = " and ".join(f"{name} {_versions.installed_version(name)}" for name in ("torch", "torch_npu"))
        raise SimulatorError(
            f"torch_npu does not import ({versions}): {_import_error}. Where a second enable() fails too, start a new "
            f"process: torch_npu cannot be imported again after it has registered itself with torch"
        ) from error


def _register_kernels() -> None:
    from moe_lowering.simulator import kernels

    kernels.register()


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Pass on all that is printed meanwhile but the warning that CANN is missing, which is known here."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            yield
    finally:
        for line in output.getvalue().splitlines():
            if not EXPECTED_NOISE.fullmatch(line.strip()):
                print(line)
