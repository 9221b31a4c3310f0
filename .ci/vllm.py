"""Makes an environment with the real vLLM and vllm-ascend, and runs ``vllm_tests`` in it, on the simulator.

    python .ci/vllm.py [PYTEST OPTION ...]      # make vllm; ``make vllm TESTS="-k eager"``

vLLM is built from its source package with an empty target (no kernels of its own: vllm-ascend brings its operators),
vllm-ascend is installed without what it depends on, beside the torch and torch_npu that it is built for, and of vLLM's
requirements all but those in ``LEFT_OUT``. It needs a C compiler, nm, readelf and the package index; no NPU, no CANN, no
NVIDIA library.
Ends with pytest's exit code, 1 when no test ran or one was skipped, 2 when the environment cannot be made.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

from environments import ROOT, EnvironmentFailure, install, make_environment

TORCH = "2.10.0"  # what vllm-ascend 0.23.0 is pinned to
VLLM = "vllm==0.23.0"
# Without their dependencies: those of vllm-ascend bring triton-ascend, torchaudio and stores of caches, those of xgrammar triton.
ALONE = ("vllm-ascend==0.23.0", "xgrammar==0.2.8", "apache-tvm-ffi")
# To build vLLM. pip would make an environment with a CUDA build of torch for it.
BUILD = ("cmake", "ninja", "setuptools-rust", "setuptools-scm>=8", "wheel")
BESIDE_TORCH = ("torchvision==0.25.0",)  # transformers imports it, for models that vllm-ascend patches
# What vllm-ascend imports and vLLM does not ask for; its own pins.
BESIDE = (
    "decorator",
    "msgpack",
    "numba",
    "numpy<2.3",
    "pandas",
    "scipy",
    "transformers==5.5.4",
    "fastapi<0.124.0",
    "cmake",
)
# Of vLLM's requirements: installed alone, above.
LEFT_OUT = ("xgrammar",)


def main(options: list[str]) -> int:
    started = time.monotonic()
    try:
        python = make()
    except (EnvironmentFailure, OSError) as error:
        print(f"make vllm: {error}", file=sys.stderr)
        return 2
    made = time.monotonic() - started
    code = run_tests(python, options)
    home = python.parent.parent
    size = sum(f.stat().st_size for f in home.rglob("*") if f.is_file() and not f.is_symlink()) / 1e9
    print(f"environment {home}: {size:.1f} GB, {made:.0f} s; tests: {time.monotonic() - started - made:.0f} s")
    return code


def make() -> Path:
    """The Python of the environment, made when it is not there or is of other requirements."""
    print("make vllm: the environment, 3 minutes or more where it is not there yet", flush=True)
    python = make_environment("vllm", TORCH, BUILD, pinned=False, beside=BESIDE_TORCH)
    ready = python.parent.parent / ".vllm"
    made_of = "\n".join([VLLM, *ALONE, *BESIDE, *LEFT_OUT])
    if ready.exists() and ready.read_text() == made_of:
        return python
    # An empty target adds "+empty" to the version, which pip then takes for another one than was asked for
    os.environ.update(
        VLLM_TARGET_DEVICE="empty", VLLM_VERSION_OVERRIDE=VLLM.partition("==")[2], TORCH_DEVICE_BACKEND_AUTOLOAD="0"
    )
    install(python, "--no-deps", "--no-build-isolation", "--no-binary", "vllm", VLLM)
    install(python, "--no-deps", *ALONE)
    install(python, f"torch=={TORCH}", *BESIDE, *requirements(python))
    install(python, "--no-deps", "--no-build-isolation", "-e", str(ROOT))  # for the entry point of the plugin
    ready.write_text(made_of)
    return python


def requirements(python: Path) -> list[str]:
    """What the installed vLLM requires, without extras and what is left out."""
    [site] = python.parent.parent.glob("lib/python*/site-packages")
    [vllm] = [d for d in importlib.metadata.distributions(path=[str(site)]) if d.metadata["Name"] == "vllm"]
    asked = [line for line in vllm.requires or [] if "extra ==" not in line]
    return [line for line in asked if re.split(r"[^\w.-]", line)[0] not in LEFT_OUT]


def run_tests(python: Path, options: list[str]) -> int:
    report = python.parent.parent / "results.xml"
    report.unlink(missing_ok=True)
    tests = ROOT / "vllm_tests"
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={tests}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([*command, f"--junitxml={report}", str(tests), *options], cwd=ROOT, env=environment)
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    skipped = any(child.tag == "skipped" for case in cases for child in case)
    return done.returncode or int(skipped or not cases)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
