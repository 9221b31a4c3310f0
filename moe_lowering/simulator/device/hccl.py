"""Backend "hccl" of torch.distributed for device "npu", over gloo, and the names of its communicators.

A group made with ``backend="hccl"`` has one backend, for device npu. It is a gloo backend whose collectives are called
with host aliases (``collectives.py``). The MC2 operators do not take a process group but the name of an HCCL
communicator, which ``group._get_backend(torch.device("npu")).get_hccl_comm_name(rank)`` gives, as in torch_npu.

CPU kernels that communicate look groups up by name and use CPU tensors. While such a kernel runs for device npu,
``resolve_groups`` makes that look-up end at a gloo group of the same ranks: from communicator names for ``npu::`` operators,
which take nothing else, and from the names of hccl groups too for ``moe_lowering::`` ones.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroupGloo

from moe_lowering.simulator.standins import SimulatorError

BACKEND = "hccl"
_c10d: Any = dist.distributed_c10d  # half of it is private, and untyped
_communicators: dict[str, Any] = {}  # communicator name -> gloo group of its ranks
_groups: dict[str, Any] = {}  # name of an hccl group -> the same
_backends: list[Any] = []  # the process group keeps the C++ object only: without this, what Python adds to it is lost
_lookup = threading.local()


class SimulatedHccl(ProcessGroupGloo):
    """What ``group._get_backend(torch.device("npu"))`` gives: gloo, and torch_npu's ``get_hccl_comm_name``."""

    def __init__(self, options: Any) -> None:
        super().__init__(options.store, options.group_rank, options.group_size, timeout=options.timeout)
        self.communicator = f"simulated%{options.group_id}%{options.global_ranks_in_group[:1] or [0]}"[:127]
        self.group = _gloo_group(self, options)
        _communicators[self.communicator] = self.group
        _groups[options.group_id] = self.group

    def get_hccl_comm_name(self, rankid: int, init_comm: bool = True) -> str:
        """The communicator's name, the same on all ranks; ``rankid`` is this rank's place in the group."""
        if rankid != self.rank():
            raise SimulatorError(f"get_hccl_comm_name: rankid is {rankid}; accepted: {self.rank()}, this rank's place")
        return self.communicator


def register() -> None:
    """Put the simulated backend in the place of torch_npu's "hccl"."""
    plugin = _c10d.Backend._BackendPlugin(_create, True)
    _c10d.Backend._plugins[BACKEND.upper()] = plugin
    original = _c10d._resolve_process_group

    def resolve(name: Any) -> Any:
        namespace = getattr(_lookup, "namespace", None)
        if namespace is None:
            return original(name)
        if name in _communicators:
            return _communicators[name]
        if namespace == "npu":
            raise LookupError(
                "no HCCL communicator has this name; get it from "
                'group._get_backend(torch.device("npu")).get_hccl_comm_name(rank)'
            )
        return _groups[name] if name in _groups else original(name)

    _c10d._resolve_process_group = resolve


@contextlib.contextmanager
def resolve_groups(namespace: str) -> Iterator[None]:
    """Names of groups mean what they mean on the device, for a CPU kernel that runs in place of a device's."""
    before = getattr(_lookup, "namespace", None)
    _lookup.namespace = namespace
    try:
        yield
    finally:
        _lookup.namespace = before


def require_communicators(operator: str, names: Iterable[str]) -> None:
    """The names of groups in a call of an ``npu::`` operator, which are looked up when it is launched.

    Raises:
        ValueError: one that is not an HCCL communicator's name.
    """
    for name in names:
        if name and name not in _communicators:
            raise ValueError(
                f"{operator}: {name!r} is no HCCL communicator; accepted: what "
                'group._get_backend(torch.device("npu")).get_hccl_comm_name(rank) returns'
            )


def _create(options: Any, pg_options: Any) -> SimulatedHccl:
    backend = SimulatedHccl(options)
    _backends.append(backend)
    return backend


def _gloo_group(backend: SimulatedHccl, options: Any) -> Any:
    """A process group for CPU tensors on the connections of ``backend``, known to torch.distributed's functions."""
    from torch.distributed import ProcessGroup

    group: Any = ProcessGroup(options.store, options.group_rank, options.group_size)
    group._set_default_backend(ProcessGroup.BackendType.GLOO)
    group._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, backend)
    group._set_group_name(f"{options.group_id}%cpu")
    members = options.global_ranks_in_group or list(range(options.group_size))
    world = _c10d._world
    world.pg_map[group] = ("gloo", options.store)
    world.pg_names[group] = f"{options.group_id}%cpu"
    world.pg_backend_config[group] = "cpu:gloo"
    world.pg_group_ranks[group] = {rank: place for place, rank in enumerate(members)}
    return group
