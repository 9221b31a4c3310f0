"""Loads vllm-ascend's compiled operators on the simulator's stand-ins, with a recorder in place of ``libopapi.so``.

``load()`` once per process, after ``simulator.enable_device()``; then ``taken()`` gives the aclnn calls since it was last
asked. The libraries that vllm-ascend links to and that the simulator has no stand-ins for are made here, in the way of
``moe_lowering.simulator.standins``: what they need to define is read from the wheel, a C function fails by name and a C++
one ends the process. ``libopapi.so`` is ``recorder.c`` with one entry for each name that the wheel looks up.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from moe_lowering.simulator import standins

PACKAGE = "vllm_ascend"
RECORDER = Path(__file__).with_name("recorder.c")
OPAPI = "libopapi.so"
SYSTEM = re.compile(r"lib(?:torch\w*|c10|stdc\+\+|m|gcc_s|c|dl|pthread|rt)\.so[.\d]*|ld-linux.*|libvllm_ascend.*")
ENTRY = re.compile(rb"(aclnn\w+?)GetWorkspaceSize")
OBJECT = re.compile(rb"acl(?:Create|Destroy)(?:Tensor|Scalar|Bool|Float|Int)\w*")
# What the wheel links to of CANN: runtime, profiling, logging, platform information.
CANN_SYMBOL = re.compile(r"(?:acl|Hccl|Msprof|dcmi|rt[A-Z]|mm[A-Z])\w+|DlogRecord|CheckLogLevel|_ZNK?2fe\w+")

_recorder: ctypes.CDLL | None = None


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an aclnn entry.

    Attributes:
        entry: its name.
        slots: integers, pointers and objects in their order, without the two results at the end.
        doubles: the bits of the floating point registers.
        ended: whether the two results were found.
        launched: whether the entry was then run.
    """

    entry: str
    slots: tuple[dict[str, Any], ...]
    doubles: tuple[int, ...]
    ended: bool
    launched: bool


def home() -> Path:
    """The directory of the installed package, which is not imported: importing it needs vLLM."""
    return Path(str(importlib.metadata.distribution(PACKAGE).locate_file(PACKAGE)))


def library() -> Path:
    [path] = home().glob("vllm_ascend_C*.so")
    return path


def load() -> None:
    """Load the operators of ``_C_ascend``; a second call does nothing.

    Raises:
        SimulatorError: no compiler or nm, or a compiler error. OSError: the libraries do not load.
    """
    global _recorder
    if _recorder is not None:
        return
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        names = _missing_libraries()
        _build(out, names)
        recorder = ctypes.CDLL(str(out / OPAPI), mode=ctypes.RTLD_GLOBAL)
        for name in sorted(names - {OPAPI}):
            ctypes.CDLL(str(out / name), mode=ctypes.RTLD_GLOBAL)
    recorder.moe_recorder_take.restype = ctypes.c_char_p
    torch.ops.load_library(str(library()))
    _recorder = recorder


def taken() -> list[Call]:
    """The calls since the last one, in their order."""
    assert _recorder is not None, "load() first"
    events = [json.loads(line) for line in _recorder.moe_recorder_take().decode().splitlines()]
    launched = {event["number"]: event["entry"] for event in events if event["event"] == "launch"}
    return [
        Call(
            event["entry"], tuple(event["slots"]), tuple(event["doubles"]), event["ended"],
            launched.get(event["number"]) == event["entry"],
        )
        for event in events if event["event"] == "sizes"
    ]  # fmt: skip


def entries() -> list[str]:
    """The aclnn entries that the library looks up by name."""
    return sorted({name.decode() for name in ENTRY.findall(library().read_bytes())})


def _missing_libraries() -> set[str]:
    """What the wheel's libraries need and neither the system, torch, torch_npu nor the simulator has."""
    there = {f"lib{name}.so" for name in standins.LIBRARIES}
    needed: set[str] = set()
    for path in _libraries():
        needed |= set(re.findall(r"NEEDED.*\[(.+)\]", standins.run_tool("readelf", "-W", "-d", str(path))))
    return {name for name in needed - there if not SYSTEM.fullmatch(name)}


def _libraries() -> list[Path]:
    return [library(), *home().glob("libvllm_ascend*.so")]


def _build(out: Path, names: set[str]) -> None:
    compiler, nm = (
        standins.find_tool(standins.COMPILERS, "a C compiler", "gcc"),
        standins.find_tool(("nm",), "nm", "binutils"),
    )
    unknown = {n.decode() for n in OBJECT.findall(library().read_bytes())} - set(
        re.findall(r"\b(acl(?:Create|Destroy)\w+)\(", RECORDER.read_text("utf-8"))
    )
    if unknown:
        raise RuntimeError(f"{RECORDER.name} does not define {', '.join(sorted(unknown))}, which {library().name} uses")
    source, empty = out / "libopapi.c", out / "empty.c"
    source.write_text(
        f'#include "{RECORDER}"\n'
        + "".join(f"ENTRY({name})\n" for name in entries())
        + standins.generate_functions(_wanted(nm))
    )
    empty.write_text("")
    link = ("-Wl,--no-as-needed", f"-L{standins.build_libraries()}", "-lascendcl")
    standins.run_tool(compiler, *standins.FLAGS, "-o", str(out / OPAPI), f"-Wl,-soname,{OPAPI}", str(source), *link)
    for name in names - {OPAPI}:
        standins.run_tool(compiler, *standins.FLAGS, "-o", str(out / name), f"-Wl,-soname,{name}", str(empty),
                      "-Wl,--no-as-needed", f"-L{out}", "-lopapi", *link)  # fmt: skip


def _wanted(nm: str) -> set[str]:
    """CANN's symbols that the wheel's libraries use, and neither they nor the simulator's define."""
    undefined, defined = set[str](), set[str]()
    for path in _libraries():
        undefined |= standins.read_symbols(nm, path, "-D", "--undefined-only")
    for path in (*_libraries(), standins.build_libraries() / f"lib{standins.LIBRARIES[0]}.so"):
        defined |= standins.read_symbols(nm, path, "-D", "--defined-only")
    return {n for n in undefined - defined if CANN_SYMBOL.fullmatch(n)}
