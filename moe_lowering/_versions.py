"""Which versions of torch and torch_npu this package was tested with, and the one place that says so when they differ.

What else depends on a version (a schema, a default) belongs here too, so that a new release is one file to read.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import re
import runpy
import sys
import warnings
from pathlib import Path

# A prefix per distribution: what the test suite runs with. Both torch 2.10 and torch_npu 2.10.0.post4 have the same
# hook signature and options, but differ in six MoE schemas, and the suite does not run there.
TESTED = {"torch": "2.13", "torch_npu": "2.13.0"}

# torch_npu (major, minor) that ends its process with SIGABRT when it is imported beside a CUDA build of torch: both define
# one key ("Duplicated key 'pinned_reserve_segment_size_mb'"). Tried with 2.10 (no collision) to 2.14, on x86-64.
COLLIDES_FROM, COLLIDES_TO = (2, 11), (2, 14)

_warned = False


def installed(distribution: str) -> str:
    """The installed version of a distribution, "" when there is none. Imports nothing."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cuda_collision() -> str:
    """Why torch_npu must not be imported beside this torch, and what to install; "" where it can be. Imports nothing."""
    found, (version, cuda) = installed("torch_npu"), torch_build()
    if cuda is None or "torch_npu" in sys.modules:  # the latter: it was, and the process lives
        return ""
    release = re.match(r"(\d+)\.(\d+)", found)
    if release is None or not COLLIDES_FROM <= (int(release[1]), int(release[2])) <= COLLIDES_TO:
        return ""
    public = version.partition("+")[0]
    return (
        f"torch {version} is a CUDA build (CUDA {cuda}), beside which torch_npu {found} aborts the process; install "
        f"the CPU build: pip install torch=={public}+cpu --index-url https://download.pytorch.org/whl/cpu"
    )


def torch_build() -> tuple[str, str | None]:
    """``torch.__version__`` and ``torch.version.cuda``, read from the file: importing torch may import torch_npu."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "", None
    names = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return names["__version__"], names["cuda"]


def untested() -> list[str]:
    """One phrase for each installed distribution whose version is not the tested one."""
    found = {name: installed(name) for name in TESTED}
    return [
        f"{name} {version} (tested: {TESTED[name]})"
        for name, version in found.items()
        if version and not _matches(version, TESTED[name])
    ]


def warn_if_untested() -> None:
    """Warn once per process when an installed version is not the tested one."""
    global _warned
    phrases = untested()
    if phrases and not _warned:
        _warned = True
        warnings.warn(f"moe_lowering was not tested with {' and '.join(phrases)}", RuntimeWarning, stacklevel=2)


@functools.cache
def sources_digest(suffixes: tuple[str, ...] = (".py", ".toml")) -> str:
    """SHA-256 (hex) of this package's files with these suffixes: its sources, and its limit tables (``.toml``)."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for file in sorted(f for f in package.rglob("*") if f.suffix in suffixes):
        digest.update(str(file.relative_to(package)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _matches(version: str, tested: str) -> bool:
    """Whether ``version`` is ``tested`` or a release of it: 2.13 takes 2.13.1 and 2.13.0+cpu, not 2.130."""
    public = version.partition("+")[0]
    return public == tested or public.startswith(tested + ".")
