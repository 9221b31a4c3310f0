"""Virtual environments with one torch and one torch_npu each, kept in ``.venvs`` (or ``$MOE_LOWERING_VENVS``).

torch is installed without its dependencies, then what its other libraries need of CUDA is replaced (``cuda_standins``), so that
nothing of NVIDIA's is downloaded; of a CPU build nothing is replaced.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import cuda_standins

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 3600  # seconds of one command

# torch -> torch_npu, each the last of its line.
PAIRS = {
    "2.10.0": "2.10.0.post4",
    "2.11.0": "2.11.0.post3",
    "2.12.0": "2.12.0.post3",
    "2.13.0": "2.13.0",
    "2.14.0": "2.14.0",
}
# What torch, torch_npu and pytest import and pip would have brought.
REQUIRED = (
    "filelock",
    "fsspec",
    "jinja2",
    "networkx",
    "numpy",
    "packaging",
    "protobuf",
    "pytest",
    "pyyaml",
    "setuptools>=77,<81",
    "sympy",
    "tomli",
    "typing-extensions",
)


class EnvironmentFailure(RuntimeError):
    """What could not be installed or made, and the last lines of why."""


def make_environment(
    name: str, torch: str, extra: Iterable[str] = (), pinned: bool = True, beside: Sequence[str] = ()
) -> Path:
    """The Python of an environment, which is made again unless it is complete and of the same Python, packages and pins.

    Args:
        name: its folder in ``.venvs``.
        torch: a key of ``PAIRS``.
        extra: requirements beside ``REQUIRED``, such as ``"transformers"``.
        beside: packages with CUDA code of their own, installed as torch is; what their ``_C*.so`` needs is replaced too.
        pinned: take versions from ``constraints.txt``; False for what has pins of its own.

    Raises:
        EnvironmentFailure: a step failed; no half-made environment is taken for a complete one.
    """
    home = Path(os.environ.get("MOE_LOWERING_VENVS", ROOT / ".venvs")) / name
    python, ready = home / "bin" / "python", home / ".ready"
    requirements = [*REQUIRED, *extra]
    pins = (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
    versions = "".join(line for line in pins if pinned and not line.startswith("torch"))
    made_of = "\n".join([sys.version, torch, PAIRS[torch], *beside, *requirements, versions])
    if ready.exists() and ready.read_text() == made_of:
        return python
    shutil.rmtree(home, ignore_errors=True)
    run_step(sys.executable, str(Path(__file__).with_name("make_venv.py")), str(home))
    install(python, "--no-deps", f"torch=={torch}", f"torch-npu=={PAIRS[torch]}", *beside)
    [package] = home.glob("lib/python*/site-packages/torch")
    try:
        names = [requirement.partition("==")[0] for requirement in beside]
        cuda_standins.replace_libraries(package, [p for n in names for p in (package.parent / n).glob("_C*.so")])
    except RuntimeError as error:
        raise EnvironmentFailure(str(error)) from error
    constraints = home / "constraints.txt"
    constraints.write_text(versions)
    install(python, "-c", str(constraints), *requirements)
    ready.write_text(made_of)
    return python


def copy_sources(target: Path) -> Path:
    """A copy of the project's files as they are now, so that work on them does not change what is being tested."""
    shutil.rmtree(target, ignore_errors=True)
    listed = run_step("git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def install(python: Path, *arguments: str) -> str:
    return run_step(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments)


def run_step(*command: str) -> str:
    """What a command printed.

    Raises:
        EnvironmentFailure: it cannot be run or ended with another code than 0.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise EnvironmentFailure(f"{command[0]}: {error}") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise EnvironmentFailure(f"{' '.join(command)} ended with {done.returncode}:\n{said}")
    return done.stdout


def run_and_log(
    command: Sequence[str], directory: Path, environment: Mapping[str, str], log: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command, output and errors together, also in ``log``; one that hangs is ended, with code 124."""
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env={**os.environ, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        text = said if isinstance(said, str) else said.decode(errors="replace")
        done = subprocess.CompletedProcess(command, 124, f"{text}\nno end after {TIMEOUT} s")
    if log is not None:
        log.write_text(done.stdout)
    return done


def replace_between(page: str, begin: str, end: str, lines: str) -> str:
    """The page with other text between two marks, each on a line of its own.

    Raises:
        ValueError: the page does not have both.
    """
    before, begun, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not begun or not ended:
        raise ValueError(f"the page has no {begin!r} with {end!r} after it")
    return f"{before}{begin}\n{lines}\n{end}{after}"
