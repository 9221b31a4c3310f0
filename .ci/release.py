"""Builds wheel and source archive, installs the wheel away from the checkout, and runs it there.

    python .ci/release.py              # `make release`; the environment is made for the Python that runs this
    python .ci/release.py --offline    # into a folder, with the packages of this Python: what the tests do

Before that the names of the release must agree (``release_names``). The wheel is built from the source archive, so that a file
that the archive lacks is missed.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from release_names import check_names

ROOT = Path(__file__).resolve().parent.parent
BUILD = "from setuptools import build_meta; build_meta.build_{kind}({folder!r})"
# What somebody does first: data files, the C file of the simulator and all modules are needed for it.
PROGRAM = """
import moe_lowering
moe_lowering.simulator.enable("A3")
import pkgutil, torch
from moe_lowering import testing
for module in pkgutil.walk_packages(moe_lowering.__path__, "moe_lowering."):
    if not module.name.endswith("__main__"):
        __import__(module.name)
with testing.fake_deployment(ep_size=16, max_tokens=128) as deployment, testing.fake_tensors():
    layer = moe_lowering.MoE(4096, 1024, num_experts=64, top_k=4, deployment=deployment, dtype=torch.bfloat16)
    x = torch.empty(128, 4096, dtype=torch.bfloat16)
    lowered = testing.lower_graph(layer, x, deployment=deployment)
testing.assert_lowered(lowered, comm="fused_mc2", ops=["moe_lowering.dispatch_ffn_combine"])
print(moe_lowering.__file__)
"""


def build(folder: Path, python: Path | None = None) -> tuple[Path, Path]:
    """(wheel, source archive) in a folder, by a Python that has setuptools; the wheel comes from what the archive holds."""
    _run(ROOT, "-c", BUILD.format(kind="sdist", folder=str(folder)), python=python)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        # Debian 12's Python, 3.11.2, has no filters; where there are some, extracting without one warns
        filters = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        tar.extractall(folder / "unpacked", **filters)
    (source,) = (folder / "unpacked").iterdir()
    _run(source, "-c", BUILD.format(kind="wheel", folder=str(folder)), python=python)
    (wheel,) = folder.glob("*.whl")
    return wheel, archive


def install_beside(wheel: Path, target: Path) -> None:
    """Only this package, into a folder; torch and the others are those of this Python."""
    _run(ROOT, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel))


def check(python: Path, target: Path | None, away: Path) -> str:
    """Run the program and the command in a folder that is no checkout; the path that the package was imported from.

    Raises:
        RuntimeError: something failed, or another package than the installed one was imported.
    """
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TORCH_DEVICE_BACKEND_AUTOLOAD")
    }
    if target is not None:
        environment["PYTHONPATH"] = str(target)
    home = _run(away, "-c", PROGRAM, python=python, environment=environment).splitlines()[-1]
    if Path(home).is_relative_to(ROOT / "moe_lowering"):
        raise RuntimeError(f"the package of the checkout was imported: {home}")
    words = shlex.split("explain --hidden 4096 --intermediate 1536 --experts 128 --topk 8 --ep 16 --tokens 128")
    out = _run(away, "-m", "moe_lowering", *words, python=python, environment=environment)
    if "choice            fused_mc2" not in out:
        raise RuntimeError(f"explain answered something else:\n{out}")
    return home


def _run(folder: Path, *words: str, python: Path | None = None, environment: dict[str, str] | None = None) -> str:
    command = [str(python or sys.executable), *words]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(words)[:200]} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        )
    return done.stdout


def main(words: list[str]) -> int:
    version = check_names()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "away").mkdir()
        if words == ["--offline"]:
            wheel, archive = build(folder)
            install_beside(wheel, folder / "target")
            home = check(Path(sys.executable), folder / "target", folder / "away")
        else:
            from environments import install, make_environment

            release = f"release-python{sys.version_info[0]}.{sys.version_info[1]}"
            python = make_environment(release, "2.13.0", ("transformers",))
            wheel, archive = build(folder, python)  # a bare Python from 3.12 on has no setuptools
            install(python, "--no-deps", "--force-reinstall", str(wheel))
            home = check(python, None, folder / "away")
        if not wheel.name.startswith(f"moe_lowering-{version}-"):
            raise RuntimeError(f"the wheel is {wheel.name}; accepted: of version {version}, as in pyproject.toml")
        print(f"Python {sys.version.split()[0]}: {wheel.name} and {archive.name} are complete; ran from {home}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
