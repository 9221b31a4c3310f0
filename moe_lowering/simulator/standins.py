"""Stand-ins for the CANN libraries that the torch_npu wheel links to, built on this machine with the C compiler.

``build_libraries()`` returns a directory that holds one shared library for each name in LIBRARIES; ``load()`` loads them for the
whole process. ``libascendcl.so`` holds all the code: ``runtime.c``, ``capture.c``, and one generated function for every
CANN symbol that the wheel's own libraries leave undefined and those two do not define; ``standin.h`` declares what
they share. A generated function fails by name: C entry points return ACL's "not supported", C++ ones (the GE and ATB
engines) abort. The other libraries are empty and link to the first; the dynamic loader matches them by soname, so no
LD_LIBRARY_PATH is needed.

Needed: a C compiler (cc, gcc or clang) and nm (binutils), on PATH, once per version of wheel, Python and this package:
the result is kept in ``$XDG_CACHE_HOME/moe_lowering/standins/<key>`` (``~/.cache`` by default). A directory there is
complete: it is built under another name and renamed, so processes that build at the same time do not meet.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from moe_lowering import _versions

# The sonames that the wheel's libraries need (readelf -d): those of libtorch_npu, then torchair's, then ATB's.
LIBRARIES = (
    "ascendcl",
    "hccl",
    "acl_op_compiler",
    "ge_runner",
    "graph",
    "acl_tdt_channel",
    "fmk_parser",
    "ascend_protobuf",
    "atb",
)
SOURCES = tuple(Path(__file__).with_name(name) for name in ("runtime.c", "capture.c"))
HEADER = Path(__file__).with_name("standin.h")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-shared", "-fPIC", "-O1", "-w", f"-I{HEADER.parent}")

# Only CANN's own names: another undefined symbol means that torch and torch_npu do not match, and the loader must say
# so; and a stand-in for, say, dlopen (which the wheel leaves unversioned) would shadow the real one.
C_NAME = re.compile(r"(?:acl|Hccl|Msprof|dcmi|rt[A-Z])\w+")
CPP_NAME = re.compile(r"_ZNK?(?:2ge|3atb)\w+")


class SimulatorError(RuntimeError):
    """The simulator cannot be used here. The message names what is missing and how to get it."""


def wheel() -> Path:
    """The directory of the installed torch_npu package, which is not imported."""
    spec = importlib.util.find_spec("torch_npu")
    if spec is None or spec.origin is None:
        raise SimulatorError("torch_npu is not installed; get it with: pip install 'moe-lowering[npu]'")
    return Path(spec.origin).parent


def build_key() -> str:
    """Names one build: the versions that decide which symbols are wanted, and a digest of the sources."""
    sources = b"".join(path.read_bytes() for path in (*SOURCES, HEADER, Path(__file__)))
    digest = hashlib.sha256(sources).hexdigest()[:12]
    versions = [f"{name}-{_versions.installed_version(name) or 'unknown'}" for name in ("torch_npu", "torch")]
    return "-".join([*versions, f"python-{platform.python_version()}", platform.machine(), digest])


def cache() -> Path:
    """Where builds are kept. A relative ``XDG_CACHE_HOME`` is ignored, as the XDG Base Directory Specification says."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".cache") / "moe_lowering" / "standins"


def build_libraries() -> Path:
    """The directory of the libraries for this wheel, built now when it is not there.

    Raises:
        SimulatorError: no torch_npu, no C compiler, no nm, a compiler error, a cache that cannot be written, or one that
            somebody else owns or may write to.
    """
    package = wheel()
    return build_once(build_key(), lambda out: _build(out, package))


def build_once(key: str, build: Callable[[Path], None]) -> Path:
    """The directory ``key`` of the cache, which ``build`` fills when it is not there.

    Raises:
        SimulatorError: as ``build_libraries``.
    """
    target = cache() / key
    if target.is_dir():
        _require_own(target)
        return target
    for tools, what, package in ((COMPILERS, "a C compiler", "gcc"), (("nm",), "nm", "binutils")):
        find_tool(tools, what, package)
    try:
        for directory in (target.parent.parent, target.parent):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="building-") as building:
            out = Path(building) / "out"
            out.mkdir(mode=0o755)
            build(out)
            for path in out.iterdir():
                path.chmod(0o644)  # the compiler follows the umask, which may let a group write
            _move(out, target)
    except OSError as error:
        raise SimulatorError(
            f"the simulator's libraries cannot be written to {target}: {error}; set XDG_CACHE_HOME to a writable place"
        ) from error
    _require_own(target)
    return target


def _require_own(target: Path) -> None:
    """The libraries run in this process: nobody but the user may have written them, or may replace them.

    Looked at are the files, and the directories from theirs up to ``moe_lowering`` in the cache. Links are not followed.
    """
    for path in (target.parent.parent, target.parent, target, *target.rglob("*")):
        status = path.lstat()
        reason = ""
        if stat.S_ISLNK(status.st_mode):
            reason = "is a symbolic link"
        elif status.st_uid != os.geteuid():
            reason = f"belongs to user {status.st_uid}"
        elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            reason = f"may be written by others (mode {stat.S_IMODE(status.st_mode):o})"
        if reason:
            raise SimulatorError(
                f"the simulator's libraries are not loaded: {path} {reason}; accepted: files and directories of user "
                f"{os.geteuid()} that nobody else may write to; delete it, or set XDG_CACHE_HOME to a place of your own"
            )


def load(directory: Path, soc_name: str) -> None:
    """Load the libraries for the whole process, for a machine whose ``aclrtGetSocName`` is ``soc_name``."""
    try:
        for name in LIBRARIES:
            library = ctypes.CDLL(str(directory / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL)
            if name == LIBRARIES[0]:
                library.moe_standin_set_soc(soc_name.encode())
    except (OSError, AttributeError) as error:
        raise SimulatorError(
            f"the simulator's libraries in {directory} do not load: {error}; delete that directory to rebuild them"
        ) from error


def find_tool(names: Iterable[str], what: str, package: str) -> str:
    """The path of the first of these programs that is there; a SimulatorError says which package brings one."""
    for name in names:
        if path := shutil.which(name):
            return path
    raise SimulatorError(
        f"{what} ({' or '.join(names)}) is not on PATH; the simulator needs it once, to build its libraries: "
        f"install {package} (apt-get install {package}, dnf install {package})"
    )


def _build(out: Path, package: Path) -> None:
    compiler, nm = find_tool(COMPILERS, "a C compiler", "gcc"), find_tool(("nm",), "nm", "binutils")
    headers, generated, empty = package / "include/third_party/acl/inc", out / "generated.c", out / "empty.c"
    if not (headers / "acl/acl.h").is_file():
        raise SimulatorError(f"torch_npu in {package} lacks ACL's headers ({headers}); reinstall the torch_npu wheel")
    objects = [out / f"{source.stem}.o" for source in SOURCES]
    symbols = _undefined_symbols(nm, package)
    for source, compiled in zip(SOURCES, objects, strict=True):
        run_tool(compiler, "-c", *FLAGS[1:], f"-I{headers}", str(source), "-o", str(compiled))
        symbols -= read_symbols(nm, compiled, "--defined-only")
    generated.write_text(generate_functions(symbols))
    empty.write_text("")
    for name in LIBRARIES:
        sources = [*map(str, objects), str(generated)]
        if name != LIBRARIES[0]:
            sources = ["-Wl,--no-as-needed", f"-L{out}", f"-l{LIBRARIES[0]}", str(empty)]
        run_tool(compiler, *FLAGS, "-o", str(out / f"lib{name}.so"), f"-Wl,-soname,lib{name}.so", *sources)


def generate_functions(names: Iterable[str]) -> str:
    """C that defines each symbol: C's return an error that names them, mangled ones of C++ end the process."""
    lines = [f'#include "{HEADER.name}"']
    for name in sorted(names):
        if CPP_NAME.fullmatch(name):
            lines.append(f'void {name}(void) {{ moe_standin_abort("{name}"); }}')
        else:
            lines.append(f'int {name}(void) {{ return moe_standin_unsupported("{name}"); }}')
    return "\n".join([*lines, ""])


def _undefined_symbols(nm: str, package: Path) -> set[str]:
    """CANN's symbols that the wheel's libraries use and none of them defines."""
    libraries = sorted(package.rglob("*.so"))
    undefined, defined = set[str](), set[str]()
    for library in libraries:
        undefined |= read_symbols(nm, library, "-D", "--undefined-only")
        defined |= read_symbols(nm, library, "-D", "--defined-only")
    return {name for name in undefined - defined if C_NAME.fullmatch(name) or CPP_NAME.fullmatch(name)}


def read_symbols(nm: str, library: Path, *options: str) -> set[str]:
    """Names without their version; the kind of symbol is the word before the name, ``w`` for one that may be absent."""
    rows = [line.split()[-2:] for line in run_tool(nm, *options, str(library)).splitlines() if line.strip()]
    return {row[-1].partition("@")[0] for row in rows if row[0] != "w"}


def run_tool(*command: str) -> str:
    """What a command prints; a SimulatorError with its errors where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SimulatorError(
            f"building the simulator's libraries failed: {' '.join(command)} ended with {done.returncode}:\n"
            f"{done.stderr}"
        )
    return done.stdout


def _move(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError:  # "directory not empty" has a different errno on each file system
        if not target.is_dir():
            raise
        # another process was first: its build is as good as ours
