"""Makes a CUDA build of torch, installed without its dependencies, one that imports and computes on CPU.

    python .ci/cuda_standins.py SITE_PACKAGES   # a virtual environment's; its torch is changed in place

Why: where the index has no CPU build, the CUDA libraries of one torch are 3 to 5 GB, and torch_npu 2.11 to 2.14 aborts the
process beside ``libtorch_cuda.so`` and ``libc10_cuda.so``, which register an allocator option that it registers too. So those two
and NVIDIA's are replaced by libraries of the same names that define what torch's other libraries need of them: the same symbols,
in the same versions. A C function of them returns an error (100, ``cudaErrorNoDevice``), a C++ one ends the process by name, and
there are no devices. Afterwards ``torch.version.cuda`` is None, as in a CPU build. What runs without a GPU is unchanged.

Needed: a C compiler and readelf (binutils).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

# torch's own libraries that hold CUDA code, and those that only they load.
REPLACED = ("libtorch_cuda.so", "libc10_cuda.so")
DROPPED = ("libtorch_cuda_linalg.so", "libcaffe2_nvrtc.so", "libtorch_nvshmem.so")
VENDOR = re.compile(r"lib(?:cu|nv|nccl)\w*\.so(?:\.\d+)*")
VENDOR_SYMBOL = re.compile(r"(?:cu|nv|nccl)\w+")
# What a CPU build says of itself. Since 2.14 `import torch` replaces CUDA kernels where the second says that there are any.
EDITS = {
    "version.py": (r"^(cuda\b.*=).*$", r"\1 None"),
    "backends/cuda/__init__.py": (r"return torch\._C\._has_cuda$", "return False"),
    "cuda/graphs.py": (r"return _cuda_isCurrentStreamCapturing\(\)$", "return False"),  # asked by dynamo's wrappers
}
REQUIREMENT = re.compile(r"Requires-Dist: (?:nvidia-|cuda-|triton)")
DEVICE_COUNT = "_ZN3c104cuda12device_countEv"
# Called while libtorch_python.so is loaded: each returns a reference to a variable, which is then written.
REFERENCES = ("_ZN4c10d15get_gil_checkerEv",)
# Constructed there since 2.14, on the heap, as a default argument that nothing reads: the class's virtual table, which that
# library has. All else is zero, with which its destructor has nothing to do.
OBJECTS = {"_ZN4c10d16ProcessGroupNCCL7OptionsC1Eb": "_ZTVN4c10d16ProcessGroupNCCL7OptionsE"}
TYPE_INFO = "_ZTVN10__cxxabiv117__class_type_infoE"
MARK = ".cuda_standins"


class Symbol(NamedTuple):
    """One of a library's dynamic symbols; ``version`` is "" where it has none."""

    name: str
    version: str
    kind: str
    size: int
    defined: bool


def main() -> int:
    if len(sys.argv) != 2 or not (torch := Path(sys.argv[1], "torch")).is_dir():
        print(f"usage: {sys.argv[0]} SITE_PACKAGES; accepted: a directory that holds torch", file=sys.stderr)
        return 2
    made = replace_libraries(torch)
    print(f"{torch}: {', '.join(made) or 'nothing to replace'}")
    return 0


def replace_libraries(torch: Path, beside: Iterable[Path] = ()) -> list[str]:
    """Put stand-ins into an installed torch; their file names, [] where there is no CUDA code or they are there.

    Args:
        torch: the directory of the package.
        beside: libraries of other packages that link to it and to NVIDIA's.

    Raises:
        RuntimeError: the compiler or readelf failed.
    """
    lib = torch / "lib"
    if (lib / MARK).exists() or not (lib / REPLACED[0]).exists():
        return []
    removed = [lib / name for name in (*REPLACED, *DROPPED) if (lib / name).exists()]
    kept = [path for path in (*lib.glob("*.so*"), *torch.glob("_C*.so"), *beside) if path not in removed]
    originals = {s.name: s for path in removed for s in symbols(path) if s.defined}
    by_library = wanted(kept, originals)
    with tempfile.TemporaryDirectory(dir=lib) as building:
        for name, missing in by_library.items():
            build(Path(building), name, missing, originals)
        for path in removed:  # only now: originals says how large their objects are
            path.unlink()
        for name in by_library:
            Path(building, name).rename(lib / name)
    for name, (pattern, replacement) in EDITS.items():
        text, count = re.subn(pattern, replacement, (torch / name).read_text(), flags=re.MULTILINE)
        if count != 1:
            raise RuntimeError(f"{torch / name} has {count} lines that match {pattern!r}; accepted: one")
        (torch / name).write_text(text)
    drop_requirements(torch.parent)
    (lib / MARK).write_text("\n".join(by_library))
    return sorted(by_library)


def wanted(kept: Iterable[Path], originals: dict[str, Symbol]) -> dict[str, dict[str, Symbol]]:
    """By library to make: what the ``kept`` libraries need of it, by name."""
    needed, undefined, defined = set[str](), dict[str, Symbol](), set[str]()
    homes = dict[str, str]()  # version -> the library that has it
    for path in kept:
        needed |= set(re.findall(r"NEEDED.*\[(.+)\]", run("readelf", "-W", "-d", str(path))))
        homes |= version_homes(run("readelf", "-W", "-V", str(path)))
        for symbol in symbols(path):
            if symbol.defined:
                defined.add(symbol.name)
            else:
                undefined[symbol.name] = symbol
    by_library: dict[str, dict[str, Symbol]] = {
        name: {} for name in sorted(needed) if name in REPLACED or VENDOR.fullmatch(name)
    }
    by_library.setdefault(REPLACED[0], {})
    for name in undefined.keys() - defined:
        symbol = undefined[name]
        if symbol.version:
            home = homes.get(symbol.version, "")
        else:
            home = REPLACED[0] if name in originals or VENDOR_SYMBOL.fullmatch(name) else ""
        if home in by_library:
            by_library[home][name] = symbol
    return by_library


def drop_requirements(site_packages: Path) -> None:
    """Let pip find nothing missing: the CUDA packages are not needed any more, nor is Triton, which is for GPUs."""
    for metadata in site_packages.glob("torch-[0-9]*.dist-info/METADATA"):
        lines = metadata.read_text().splitlines(keepends=True)
        metadata.write_text("".join(line for line in lines if not REQUIREMENT.match(line)))


def build(directory: Path, name: str, missing: dict[str, Symbol], originals: dict[str, Symbol]) -> None:
    """Compile ``directory / name``, which defines ``missing``."""
    versions = {symbol.version for symbol in missing.values()} - {""}
    source, script, out = directory / "standin.c", directory / "standin.map", directory / name
    source.write_text(generate(missing.values(), originals))
    script.write_text("".join(f"{version} {{ global: *; }};\n" for version in versions) or "{ global: *; };\n")
    if len(versions) > 1:
        raise RuntimeError(f"{name} would need the versions {sorted(versions)}; accepted: one")
    flags = ("-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{name}", f"-Wl,--version-script={script}")
    run("cc", *flags, "-o", str(out), str(source), "-l:libstdc++.so.6")


def generate(missing: Iterable[Symbol], originals: dict[str, Symbol]) -> str:
    """C source that defines the symbols."""
    lines = [
        "#include <malloc.h>",
        "#include <stdio.h>",
        "#include <stdlib.h>",
        "#include <string.h>",
        f"extern char {TYPE_INFO}[];",
        "static void refuse(const char *name) {",
        '  fprintf(stderr, "CUDA stand-in: %s was called; this torch has no CUDA code\\n", name);',
        "  abort();",
        "}",
    ]
    for symbol in sorted(missing):
        name, original = symbol.name, originals.get(symbol.name, symbol)
        if name.startswith("_ZTI"):
            lines.append(f'void *{name}[2] = {{{TYPE_INFO} + 16, "{name[4:]}"}};')
        elif original.kind in ("OBJECT", "TLS"):
            thread = "__thread " if original.kind == "TLS" else ""
            lines.append(f"{thread}char {name}[{max(original.size, 8)}] __attribute__((aligned(16)));")
        elif name == DEVICE_COUNT:
            lines.append(f"int {name}(void) {{ return 0; }}")
        elif name in REFERENCES:
            lines.append(f"void *{name}(void) {{ static void *variable[8]; return variable; }}")
        elif name in OBJECTS:
            table = OBJECTS[name]
            lines.append(f"extern char {table}[] __attribute__((weak));")
            lines.append(f"void {name}(char **self) {{")
            lines.append(f"  memset(self, 0, malloc_usable_size(self)); *self = {table} + 16; }}")
        elif name.startswith("_Z"):
            lines.append(f'void {name}(void) {{ refuse("{name}"); }}')
        elif "String" in name or name.endswith("ErrorName"):
            lines.append(f'const char *{name}(void) {{ return "no CUDA here"; }}')
        else:
            lines.append(f"int {name}(void) {{ return 100; }}")
    return "\n".join([*lines, ""])


def symbols(library: Path) -> list[Symbol]:
    """The global dynamic symbols of a library; weak ones that may be absent are left out."""
    found = []
    for line in run("readelf", "-W", "--dyn-syms", str(library)).splitlines():
        words = line.split()
        if len(words) < 8 or not words[0].rstrip(":").isdigit() or words[4] == "LOCAL":
            continue
        defined = words[6] != "UND"
        if words[4] == "WEAK" and not defined:
            continue
        name, _, version = words[7].partition("@")
        found.append(Symbol(name, version.lstrip("@"), words[3], int(words[2], 0), defined))
    return found


def version_homes(text: str) -> dict[str, str]:
    """Version -> library, from the section of needed versions that ``readelf -V`` prints."""
    homes, library = {}, ""
    for line in text.splitlines():
        if match := re.search(r"File: (\S+)", line):
            library = match[1]
        elif library and (match := re.search(r"Name: (\S+)\s+Flags:", line)):
            homes[match[1]] = library
    return homes


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
