"""The real engine in processes of its own, on the simulator. Run by ``make vllm``."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import serve

HERE = Path(__file__).parent
REQUESTS = 50
TIMEOUT = 900  # seconds of one engine on a busy machine


class Reference(NamedTuple):
    """A checkpoint, and what transformers computes with it: tokens, and the best first ones' log probabilities."""

    folder: Path
    tokens: list[list[int]]
    logprobs: list[dict[str, float]]


def simulate(*command, soc="A3", devices=1, timeout=TIMEOUT, settings=None):
    """Run a program as a user does; (exit code, stdout, stderr).

    Output goes to files: a pipe stays open until the last process that has it ends, and vLLM's processes may outlive the
    program by a while. What is left of them when the program ends, or is out of time, is ended here.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONSAFEPATH",)}
    paths = [str(HERE), *filter(None, [environment.get("PYTHONPATH")])]  # for ``faults``, in the processes of vLLM
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    environment.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # threads of small kernels wait for each other where processors are shared
    launcher = [sys.executable, "-m", "moe_lowering", "simulate", "--soc", soc, "--devices", str(devices), "--"]
    program = [sys.executable, *map(str, command)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        process = subprocess.Popen(
            [*launcher, *program],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=error,
            env={**environment, **(settings or {})},
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0), error.seek(0)
        text, log = out.read(), error.read()
    assert code is not None, f"no end after {timeout} s:\n{log[-5000:]}"
    return code, text, log


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """``checkpoint(model, prompts=50, **settings)``: a ``Reference`` with so many requests, each made once."""
    results = {}

    def make(model="qwen3_moe", prompts=REQUESTS, **settings):
        key = json.dumps([model, settings], sort_keys=True)
        if key not in results:
            folder = tmp_path_factory.mktemp(model)
            asked = serve.prompts(serve.Settings(model="", cache="", requests=prompts)) if prompts else []
            asked = {"folder": str(folder), "model": model, "prompts": asked, **settings}
            code, out, error = simulate(HERE / "checkpoint.py", json.dumps(asked))
            assert code == 0, error[-3000:]
            results[key] = Reference(folder, **json.loads(out))
        return results[key]

    return make


@pytest.fixture(scope="session")
def reference(checkpoint):
    """Of a Qwen3-MoE."""
    return checkpoint()


@pytest.fixture(scope="session")
def served(reference, tmp_path_factory):
    """``served(**settings)``: what ``serve.py`` prints, each once; ``fails=True`` for (exit code, stderr)."""
    results = {}

    def run(fails=False, soc="A3", environment=None, timeout=TIMEOUT, **settings):
        key = json.dumps([soc, environment, settings], sort_keys=True)
        if key not in results:
            cache = str(tmp_path_factory.mktemp("cache"))
            given = {"model": str(reference.folder), "cache": cache, "requests": REQUESTS, **settings}
            ranks = settings.get("ranks", 1) * settings.get("replicas", 1)
            program = (HERE / "serve.py", json.dumps(given))
            results[key] = simulate(*program, soc=soc, devices=ranks, timeout=timeout, settings=environment)
        code, out, error = results[key]
        if fails:
            return code, error
        assert code == 0, error[-5000:]
        return {**json.loads(out), "log": error}

    return run
