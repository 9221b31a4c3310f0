"""The fields of a ``Deployment`` that process groups, the NPU, CANN, torch_npu, HCCL's environment and installed providers give.

1. Groups give names, sizes and this process's ranks. MC2 takes a communicator's name: HCCL's where the group has one (device
   npu), else the name of the process group.
2. The machine fills the fields that the caller left out. A field that the caller set stays; where the machine says something
   else, the deployment's ``detected`` shows both, and a SoC that is not the NPU's own is an error.

A field that a decision depends on has no default: without an NPU to ask, the caller must name the SoC.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lowering import _versions
from moe_lowering.providers import declarable, installed_providers, is_version
from moe_lowering.vocabulary import SOCS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

BUFFER = "HCCL_BUFFSIZE"
BUFFER_DEFAULT = 200  # MB; CANN's HCCL documentation, environment variable HCCL_BUFFSIZE
_HOMES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")  # set by CANN's set_env.sh
_FROM_GROUPS = {"ep_group": "ep", "tp_group": "tp"}


@dataclasses.dataclass(frozen=True)
class Detected:
    """A field of a deployment that was read from a group or the machine, or was compared with them: where it was read,
    and the value."""

    field: str
    value: str
    source: str


def detect(
    ep: ProcessGroup | None, tp: ProcessGroup | None, mc2: ProcessGroup | None, declared: dict[str, Any]
) -> tuple[dict[str, Any], list[Detected]]:
    """Fields of a deployment: the caller's, and those that its groups and the machine give. No group is made.

    Args:
        ep, tp, mc2, given: as for ``Deployment.from_groups``.

    Returns:
        The fields but ``mc2_group``, unless that is given; and those that were found.

    Raises:
        ValueError, TypeError: as ``Deployment.from_groups``.
    """
    for field, name in _FROM_GROUPS.items():
        if field in declared:
            raise ValueError(f"Deployment.from_groups: {field} is given; accepted: the group itself, as {name}")
    if mc2 is not None and "mc2_group" in declared:
        raise ValueError("Deployment.from_groups: mc2 and mc2_group are given; accepted: one of them")
    _check_alone(ep)
    members = {name: _members(name, group) for name, group in (("ep", ep), ("tp", tp), ("mc2", mc2))}
    if mc2 is not None:
        _check_second(ep, mc2, members)
    groups = _sizes(ep, tp)
    detected = [
        Detected(f"{kind}_size", str(groups[f"{kind}_size"]), f"{kind}_group {groups[f'{kind}_group']!r}")
        for kind in ("ep", "tp")
        if f"{kind}_group" in groups and f"{kind}_size" not in declared
    ]
    return {**groups, **_machine(declared, detected), **declared}, detected


def second_communicator(ep: ProcessGroup | None, mc2: ProcessGroup | None) -> Detected | None:
    """The ``mc2_group`` of a deployment: of ``mc2``, or of a group that is made over the ranks of ``ep``; None without both.

    **A collective** when ``mc2`` is None and ``ep`` is not.
    """
    communicator: Any = mc2
    if mc2 is None and ep is not None:  # of one rank too: the others' groups are made by all
        communicator = _second_group(ep, _members("ep", ep))
    if communicator is None:
        return None
    name, how = communicator_name(communicator)
    return Detected("mc2_group", name, f"{how} of {'a second group over the ranks of ep' if mc2 is None else 'mc2'}")


def own_communicator(ep: ProcessGroup | None, size: int) -> Detected | None:
    """The ``ep_communicator`` of a deployment: that of ``ep`` itself, where it has one by now; of one rank none.

    Asking makes no communicator: HCCL's takes a window of ``HCCL_BUFFSIZE`` on each rank, which nobody needs who never uses
    the group. Code that calls MC2 operators has asked for the name before it is compiled.
    """
    if ep is None or size == 1:
        return None
    name, how = communicator_name(ep, make=False)
    return Detected("ep_communicator", name, f"{how} of ep") if name else None


def groups_of_mesh(device_mesh: DeviceMesh, ep: str | tuple[str, ...], tp: str | None) -> dict[str, Any]:
    """The process groups ``ep`` and ``tp`` of a device mesh, as ``Deployment.from_mesh`` describes them.

    Raises:
        TypeError: it is no device mesh. ValueError: the mesh has no such dimension.
    """
    if not hasattr(device_mesh, "mesh_dim_names"):
        raise TypeError(
            f"Deployment.from_mesh: device_mesh is {device_mesh!r}; accepted: a DeviceMesh, as init_device_mesh makes one"
        )
    names = tuple(getattr(device_mesh, "mesh_dim_names", None) or ())
    if tp == "tp" and tp not in names:
        tp = None
    groups = {"ep": _dimension(device_mesh, names, "ep", ep)}
    if tp is not None:
        groups["tp"] = _dimension(device_mesh, names, "tp", tp)
    return groups


def _dimension(mesh: Any, names: tuple[str, ...], argument: str, dimension: str | tuple[str, ...]) -> Any:
    """The process group of one dimension, or of several together."""
    dimensions = tuple(dimension) if isinstance(dimension, (tuple, list)) else (dimension,)
    if not dimensions or not all(isinstance(each, str) for each in dimensions):
        raise ValueError(
            f"Deployment.from_mesh: {argument} is {dimension!r}; accepted: of the mesh's dimensions {list(names)}, one name or "
            "several"
        )
    try:
        part = mesh[dimensions[0] if len(dimensions) == 1 else dimensions]
        return (part._flatten() if len(dimensions) > 1 else part).get_group()
    except (KeyError, RuntimeError, ValueError) as error:  # what torch's versions raise for a name that is not there
        raise ValueError(
            f"Deployment.from_mesh: {argument} is {dimension!r}; accepted: of the mesh's dimensions {list(names)} ({error})"
        ) from error


def _check_alone(ep: Any) -> None:
    """Without a group a rank is alone, with all experts. ``dist.group.WORLD`` is None, too, until there is a process group."""
    import torch.distributed as dist

    ranks = os.environ.get("WORLD_SIZE", "1")
    if ep is None and ranks != "1" and not dist.is_initialized():
        raise ValueError(
            f"Deployment.from_groups: ep is None, WORLD_SIZE is {ranks} and there is no process group; accepted: a group, "
            "after torch.distributed.init_process_group, before which dist.group.WORLD is None (a rank that is alone: "
            "WORLD_SIZE unset or 1)"
        )


def _members(name: str, group: Any) -> list[int]:
    """Global ranks of a group; [] for None."""
    import torch.distributed as dist

    if group is None:
        return []
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"Deployment.from_groups: {name} is {group!r}; accepted: a torch.distributed.ProcessGroup with this process in "
            "it, or None"
        )
    return dist.get_process_group_ranks(group)


def _sizes(ep: Any, tp: Any) -> dict[str, Any]:
    """Sizes and names; ranks follow from the names. A group of one rank is no group."""
    import torch.distributed as dist

    fields: dict[str, Any] = {}
    for kind, group in (("ep", ep), ("tp", tp)):
        size = 1 if group is None else dist.get_world_size(group)
        fields[f"{kind}_size"] = size
        if size > 1:
            fields[f"{kind}_group"] = group.group_name
    return fields


def _check_second(ep: Any, mc2: Any, members: dict[str, list[int]]) -> None:
    """What ``Deployment`` cannot see behind the name of an HCCL communicator."""
    if mc2 is ep:
        raise ValueError(
            "Deployment.from_groups: mc2 is ep; accepted: a second group over its ranks, which no other collective uses, or no "
            "mc2: then one is made"
        )
    if members["mc2"] != members["ep"]:
        raise ValueError(
            f"Deployment.from_groups: mc2 has global ranks {members['mc2']}; accepted: those of ep, {members['ep']}"
        )


def _second_group(ep: Any, own: list[int]) -> Any:
    """A group over the ranks of ``ep``, of its own; every rank makes those of all EP groups, as ``new_group`` wants it."""
    import torch.distributed as dist

    everyone: list[Any] = [own]
    if len(own) < dist.get_world_size():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
    own_group = None
    for members in dict.fromkeys(tuple(ranks) for ranks in everyone if len(ranks) > 1):
        group = dist.new_group(list(members), backend=dist.get_backend_config(ep))
        own_group = group if members == tuple(own) else own_group
    return own_group


def communicator_name(group: Any, make: bool = True) -> tuple[str, str]:
    """What MC2 operators take for a group, and what that is: HCCL's communicator on device npu, else the group's name.

    Without ``make`` the name is "" where HCCL has no communicator of the group yet.
    """
    import torch.distributed as dist

    for device in group._device_types:
        if device.type == "npu":
            backend = group._get_backend(device)
            if hasattr(backend, "get_hccl_comm_name"):
                return str(backend.get_hccl_comm_name(dist.get_rank(group), init_comm=make)), "HCCL's communicator"
    return str(group.group_name), "the name"


def _machine(declared: dict[str, Any], detected: list[Detected]) -> dict[str, Any]:
    """The fields that the machine gives and the caller does not; ``found`` is added to."""
    where = ", ".join(package.where for package in installed_providers())
    readings = {
        "soc": _soc(declared.get("soc")),
        "cann": _cann(),
        "torch_npu": (_versions.installed_version("torch_npu").partition("+")[0], "metadata of torch_npu"),
        "hccl_buffer_mb": _buffer(),
        "providers": (declarable(), where),
    }
    fields: dict[str, Any] = {}
    for field, (value, source) in readings.items():
        if field not in declared:
            fields[field] = value
        if field not in declared or (source and declared[field] != value):
            how = f"{source or 'not found'}" if field not in declared else f"given; {source} says {_write_value(value)}"
            detected.append(Detected(field, _write_value(fields.get(field, declared.get(field))), how))
    return fields


def _write_value(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(" ".join(pair) for pair in value) or "none"
    return str(value) or "unknown"


def _soc(declared_soc: str | None) -> tuple[str | None, str]:
    """The SoC of this process's NPU, as torch_npu names it; None on a machine without one."""
    npu: Any = getattr(sys.modules.get("torch"), "npu", None) if "torch_npu" in sys.modules else None
    if npu is None or not npu.is_available():
        if declared_soc is None:
            raise ValueError(
                f"Deployment.from_groups: soc is not given, and there is no NPU to ask (torch_npu is not imported, or has no "
                f'device); accepted: {", ".join(SOCS)}, or moe_lowering.simulator.enable("A3") before'
            )
        return declared_soc, ""
    name = npu.get_device_name()
    soc = next((soc.name for soc in SOCS.values() if re.fullmatch(soc.runtime_pattern, name)), None)
    if soc is None and declared_soc is None:
        raise ValueError(
            f"Deployment.from_groups: soc is not given, and the NPU is {name!r}, which is none that this package knows; "
            f"accepted: {', '.join(SOCS)}"
        )
    if soc is not None and declared_soc is not None and declared_soc != soc:
        raise ValueError(
            f"Deployment.from_groups: soc is {declared_soc!r}, and the NPU is {name!r}; accepted: {soc!r}, or no soc"
        )
    return soc or name, f"torch.npu.get_device_name() is {name!r}"


def _cann() -> tuple[str, str]:
    """CANN's version from the file that its installer writes; "" where there is none."""
    for variable in _HOMES:
        home = os.environ.get(variable, "")
        for file in sorted(Path(home).glob("*/ascend_*_install.info")) if home else []:
            match = re.search(r"^version=(\S+)\s*$", file.read_text("utf-8", "replace"), re.MULTILINE)
            if match is not None and is_version(match[1]):
                return match[1], str(file)
    return "", ""


def _buffer() -> tuple[int, str]:
    """MB of HCCL's window."""
    text = os.environ.get(BUFFER)
    if text is None:
        return BUFFER_DEFAULT, f"{BUFFER} is not set: CANN's default"
    if not re.fullmatch(r"[1-9]\d*", text.strip(), re.ASCII):
        raise ValueError(f"Deployment.from_groups: the environment has {BUFFER}={text!r}; accepted: MB, 1 or more")
    return int(text), f"{BUFFER}"
