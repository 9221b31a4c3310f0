"""What vllm-ascend needs of the simulator beside torch_npu.

That is CANN libraries that its compiled operators link to, kernels for those operators, and a stand-in for a kernel
that it writes in Triton (``SlotMapping``).

The operators' schemas and meta kernels are those of the real library, ``vllm_ascend_C``. The libraries are built with
the symbols that it lacks, as in ``standins``; an operator without a kernel here fails, as its aclnn entry is not in
``libopapi.so``.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from moe_lowering import _versions
from moe_lowering.simulator import standins
from moe_lowering.simulator.kernels import register_kernels as register_cpu_kernels
from moe_lowering.simulator.kernels import vllm_operators
from moe_lowering.simulator.kernels.common import with_limits

NAMESPACE = "_C_ascend"
OPAPI = "libopapi.so"
SYSTEM = re.compile(r"lib(?:torch\w*|c10|stdc\+\+|m|gcc_s|c|dl|pthread|rt)\.so[.\d]*|ld-linux.*|libvllm_ascend.*")
# What the library links to of CANN: runtime, profiling, logging, platform information.
CANN_SYMBOL = re.compile(r"(?:acl|Hccl|Msprof|dcmi|rt[A-Z]|mm[A-Z])\w+|DlogRecord|CheckLogLevel|_ZNK?2fe\w+")

_loaded: list[ctypes.CDLL] = []


def load_libraries() -> None:
    """Load the stand-ins for what vllm-ascend's compiled operators link to. A second call does nothing.

    Raises:
        SimulatorError: vllm-ascend is not installed, or the stand-ins cannot be built (see ``standins``).
    """
    if _loaded:
        return
    package = _package()
    out = _build(package)
    for path in (out / OPAPI, *sorted(path for path in out.glob("*.so") if path.name != OPAPI)):
        _loaded.append(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL))


def _package() -> Path:
    spec = importlib.util.find_spec("vllm_ascend")
    if spec is None or spec.origin is None:
        raise standins.SimulatorError("vllm-ascend is not installed; get it with: pip install --no-deps vllm-ascend")
    return Path(spec.origin).parent


def _libraries(package: Path) -> list[Path]:
    return [*package.glob("vllm_ascend_C*.so"), *package.glob("libvllm_ascend*.so")]


def _build(package: Path) -> Path:
    sizes = "".join(f"{path.name} {path.stat().st_size}\n" for path in sorted(_libraries(package)))
    digest = hashlib.sha256(f"{sizes}{Path(__file__).read_text('utf-8')}".encode()).hexdigest()[:12]
    name = f"{standins.build_key()}-vllm_ascend-{_versions.installed_version('vllm_ascend')}-{digest}"
    return standins.build_once(name, lambda out: _compile(out, package))


def _compile(out: Path, package: Path) -> None:
    compiler, nm = (
        standins.find_tool(standins.COMPILERS, "a C compiler", "gcc"),
        standins.find_tool(("nm",), "nm", "binutils"),
    )
    libraries = _libraries(package)
    undefined, defined = set[str](), set[str]()
    for path in libraries:
        undefined |= standins.read_symbols(nm, path, "-D", "--undefined-only")
    for path in (*libraries, standins.build_libraries() / f"lib{standins.LIBRARIES[0]}.so"):
        defined |= standins.read_symbols(nm, path, "-D", "--defined-only")
    symbols = {name for name in undefined - defined if CANN_SYMBOL.fullmatch(name)}
    generated, empty = out / "generated.c", out / "empty.c"
    generated.write_text(standins.generate_functions(symbols))
    empty.write_text("")
    ours = ("-Wl,--no-as-needed", f"-L{standins.build_libraries()}", f"-l{standins.LIBRARIES[0]}")
    standins.run_tool(compiler, *standins.FLAGS, "-o", str(out / OPAPI), f"-Wl,-soname,{OPAPI}", str(generated), *ours)
    readelf = standins.find_tool(("readelf",), "readelf", "binutils")
    needed = set[str]()
    for path in libraries:
        needed |= set(re.findall(r"NEEDED.*\[(.+)\]", standins.run_tool(readelf, "-W", "-d", str(path))))
    there = {f"lib{name}.so" for name in standins.LIBRARIES} | {OPAPI, "libtorch_npu.so"}
    for name in sorted(name for name in needed - there if not SYSTEM.fullmatch(name)):
        link = ("-Wl,--no-as-needed", f"-L{out}", "-lopapi", *ours)
        standins.run_tool(compiler, *standins.FLAGS, "-o", str(out / name), f"-Wl,-soname,{name}", str(empty), *link)


def register_kernels() -> None:
    """Kernels for the operators of ``_C_ascend``, once its library is loaded."""
    from moe_lowering.simulator.device import registration

    operators: Any = getattr(torch.ops, NAMESPACE)
    there = {name: kernel for name, kernel in vllm_operators.KERNELS.items() if hasattr(operators, name)}
    register_cpu_kernels(
        NAMESPACE, {name: with_limits(getattr(operators, name).default, kernel) for name, kernel in there.items()}
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Overriding a previously registered kernel.*")
        registration.register_namespace(NAMESPACE, there)


class SlotMapping:
    """``vllm.v1.worker.block_table._compute_slot_mapping_kernel``, which is written in Triton: where in the paged cache each
    token of a batch goes. ``SlotMapping()[grid](...)``, as a Triton kernel is launched.
    """

    def __getitem__(self, grid: tuple[int, ...]) -> SlotMapping:
        requests = SlotMapping()
        requests.requests = grid[0] - 1  # the last program pads
        return requests

    requests = 0

    def __call__(
        self,
        num_tokens: int,
        max_num_tokens: int,
        query_start_loc: torch.Tensor,
        positions: torch.Tensor,
        block_table: torch.Tensor,
        block_table_stride: int,
        block_size: int,
        slot_mapping: torch.Tensor,
        *,
        TOTAL_CP_WORLD_SIZE: int,
        TOTAL_CP_RANK: int,
        CP_KV_CACHE_INTERLEAVE_SIZE: int,
        PAD_ID: int,
        BLOCK_SIZE: int,
    ) -> None:
        """Slot of token t of request r: block_table[r, position // block_size] * block_size + position % block_size; PAD_ID for
        what lies on another rank of a context-parallel group, and from ``num_tokens`` on."""
        ranks, interleave = TOTAL_CP_WORLD_SIZE, CP_KV_CACHE_INTERLEAVE_SIZE
        starts = query_start_loc[: self.requests + 1].cpu().long()
        last = int(starts[-1])
        requests = torch.repeat_interleave(torch.arange(self.requests), starts.diff())
        places = positions[:last].cpu().long()
        blocks = block_table.cpu().long()[requests, places // (block_size * ranks)]
        offsets = places % (block_size * ranks)
        own = (offsets // interleave) % ranks == TOTAL_CP_RANK
        within = offsets // (ranks * interleave) * interleave + offsets % interleave
        slots = torch.full((max_num_tokens,), PAD_ID, dtype=slot_mapping.dtype)
        kept = slot_mapping[last:num_tokens].cpu()  # between the last request and num_tokens the kernel writes nothing
        slots[last:num_tokens] = kept
        slots[:last] = torch.where(own, blocks * block_size + within, PAD_ID).to(slots.dtype)
        slot_mapping[:max_num_tokens].copy_(slots)
