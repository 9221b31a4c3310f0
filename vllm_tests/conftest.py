"""The real engine in processes of its own, on the simulator. Run by ``make vllm``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import serve

HERE = Path(__file__).parent
TIMEOUT = 900  # seconds of one engine on a busy machine


def simulate(*command, soc="A3", devices=1, timeout=TIMEOUT):
    """Run a program as a user does; (exit code, stdout, stderr)."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONSAFEPATH",)}
    launcher = [sys.executable, "-m", "moe_lowering", "simulate", "--soc", soc, "--devices", str(devices), "--"]
    program = [sys.executable, *map(str, command)]
    done = subprocess.run([*launcher, *program], capture_output=True, text=True, timeout=timeout, env=environment)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """(folder of the checkpoint, transformers' tokens for 50 requests)."""
    folder = tmp_path_factory.mktemp("qwen3_moe")
    prompts = serve.prompts(serve.Settings(model="", cache="", requests=50))
    code, out, error = simulate(HERE / "checkpoint.py", folder, json.dumps(prompts))
    assert code == 0, error[-3000:]
    return folder, json.loads(out)


@pytest.fixture(scope="session")
def served(reference, tmp_path_factory):
    """``served(**settings)``: what ``serve.py`` prints, each once; ``fails=True`` for (exit code, stderr)."""
    results = {}

    def run(fails=False, soc="A3", **settings):
        key = json.dumps([soc, settings], sort_keys=True)
        if key not in results:
            given = {
                "model": str(reference[0]),
                "cache": str(tmp_path_factory.mktemp("cache")),
                "requests": 50,
                **settings,
            }
            ranks = settings.get("ranks", 1)
            results[key] = simulate(HERE / "serve.py", json.dumps(given), soc=soc, devices=ranks)
        code, out, error = results[key]
        if fails:
            return code, error
        assert code == 0, error[-5000:]
        return {**json.loads(out), "log": error}

    return run
