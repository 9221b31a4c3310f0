"""Everything in the package that depends on the installed versions of torch and torch_npu, so that a release is one file to read.

- The pairs that this package is tested with, one warning for any other pair, and the pairs whose import kills the process.
- Arguments of operators that older versions lack, and functions of torch whose signature changed.
- ``sources_digest``: the digest of this package's own files, for compile caches and for the comparison of ranks.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch._ops import OpOverload
    from torch.library import Library

# (torch, torch_npu), prefixes of versions: pairs for which `make versions` is green. CI runs the whole suite with 2.13.
TESTED = (("2.10", "2.10.0"), ("2.11", "2.11.0"), ("2.12", "2.12.0"), ("2.13", "2.13.0"), ("2.14", "2.14.0"))

# torch_npu (major, minor) that ends its process with SIGABRT when it is imported beside a CUDA build of torch: both define
# one key ("Duplicated key 'pinned_reserve_segment_size_mb'"). Tried with 2.10 (no collision) to 2.14, on x86-64.
COLLIDES_FROM, COLLIDES_TO = (2, 11), (2, 14)

_warned = False


@functools.cache  # each reading parses the whole metadata, 8 ms
def installed_version(distribution: str) -> str:
    """The installed version of a distribution, "" when there is none. Imports nothing."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cuda_collision() -> str:
    """Why torch_npu must not be imported beside this torch, and what to install; "" where it can be. Imports nothing."""
    npu_version, (version, cuda) = installed_version("torch_npu"), torch_build()
    if cuda is None or "torch_npu" in sys.modules:  # torch_npu is imported already, and the process did not end
        return ""
    if not COLLIDES_FROM <= release("torch_npu") <= COLLIDES_TO:
        return ""
    public = version.partition("+")[0]
    return (
        f"torch {version} is a CUDA build (CUDA {cuda}), beside which torch_npu {npu_version} aborts the process; install "
        f"the CPU build: pip install torch=={public}+cpu --index-url https://download.pytorch.org/whl/cpu"
    )


def torch_build() -> tuple[str, str | None]:
    """``torch.__version__`` and ``torch.version.cuda``, read from the file: importing torch may import torch_npu."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "", None
    names = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return names["__version__"], names["cuda"]


def describe_untested_pair() -> str:
    """The installed pair of torch and torch_npu when it is none of the tested ones, else "". Without torch_npu the
    version of torch is compared alone."""
    torch, torch_npu = installed_version("torch"), installed_version("torch_npu")
    for tested, tested_npu in TESTED:
        if _matches(torch, tested) and (not torch_npu or _matches(torch_npu, tested_npu)):
            return ""
    pairs = ", ".join(" with ".join(pair) for pair in TESTED)
    return f"torch {torch}{f' and torch_npu {torch_npu}' if torch_npu else ''} (tested: {pairs})"


def warn_if_untested() -> None:
    """Warn once per process when the installed pair is none of the tested ones."""
    global _warned
    if not _warned and (pair := describe_untested_pair()):
        _warned = True
        warnings.warn(f"moe_lowering was not tested with {pair}", RuntimeWarning, stacklevel=2)


def release(distribution: str) -> tuple[int, int]:
    """(major, minor) of an installed distribution, (0, 0) when there is none. Imports nothing."""
    match = re.match(r"(\d+)\.(\d+)", installed_version(distribution))
    return (int(match[1]), int(match[2])) if match else (0, 0)


# Arguments that operators of npu:: got, with their defaults: what a call of an older torch_npu means.
# Sources: wheel_2_10.schemas, wheel_2_11.schemas.
_LATER_ARGUMENTS: dict[str, dict[str, Any]] = {
    "npu::npu_moe_gating_top_k": {"input_ids": None, "tid2eid": None},  # torch_npu 2.11
    "npu::npu_moe_finalize_routing": {"k": 1},  # torch_npu 2.11
}


def later_arguments(op: OpOverload) -> dict[str, Any]:
    """The arguments that a later torch_npu's operator has and this one's has not, with their defaults."""
    later = _LATER_ARGUMENTS.get(op._schema.name, {})
    have = {argument.name for argument in op._schema.arguments} if later else set()
    return {name: default for name, default in later.items() if name not in have}


def overriding_impl(library: Library) -> Callable[..., None]:
    """``library.impl``, which may replace a Python kernel: torch 2.13 made that the default of ``allow_override``."""
    return functools.partial(library.impl, allow_override=True)


def refake_inputs(example_inputs: Sequence[Any]) -> Sequence[Any]:
    """What a dynamo backend gives to AOTAutograd, without fake tensors of another mode than dynamo's.

    torch 2.10 refuses them ("fake mode ... doesn't match mode ..."); 2.11 converts them itself
    (``detect_fake_mode`` in torch/_guards.py, ``process_inputs`` in torch/_functorch/_aot_autograd/frontend_utils.py).
    """
    if release("torch") >= (2, 11):
        return example_inputs
    from torch._guards import TracingContext
    from torch._subclasses.fake_tensor import FakeTensor

    tracing = TracingContext.try_get()
    if tracing is None or tracing.fake_mode is None:
        return example_inputs
    mode = tracing.fake_mode
    contexts: Any = tracing.tensor_to_context  # its methods have no types

    def convert(value: Any) -> Any:
        if not isinstance(value, FakeTensor) or value.fake_mode is mode:
            return value
        context = contexts.get(value)
        return mode.from_tensor(value, symbolic_context=context, source=context and context.tensor_source, trace=False)

    return [convert(value) for value in example_inputs]


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
