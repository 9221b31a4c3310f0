"""Every Python snippet of README and docs runs as it stands, in a process of its own that has not imported torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from moe_lowering._bootstrap import AUTOLOAD

TOP = Path(__file__).parents[2]
PAGES = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))]
SNIPPET = re.compile(r"^ *```python\n(.*?)^ *```$", re.S | re.M)
# What stands before a snippet that speaks of the reader's own model and machine, by a line of the snippet.
CONTEXT = {
    "moe_lowering.shard_experts(model, deployment)": """
import moe_lowering.simulator
moe_lowering.simulator.enable("A3")
import torch
import torch.distributed as dist
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
ep_group = dist.new_group([0])
model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
    vocab_size=64, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, num_experts=16, num_experts_per_tok=2,
))
""",
}
# Runs a module of tests as a stranger's suite: no conftest of ours.
RUN_TESTS = """
import pathlib, sys, tempfile, pytest
with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder, "test_theirs.py")
    file.write_text({text!r})
    code = pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", folder, str(file)])
sys.exit(code)
"""


def snippets() -> list[tuple[str, str]]:
    """(page and line, text) of each; one that stands on two pages once."""
    places: dict[str, str] = {}
    for page in PAGES:
        for match in SNIPPET.finditer(page.read_text()):
            line = page.read_text()[: match.start()].count("\n") + 1
            places.setdefault(textwrap.dedent(match[1]), f"{page.name}:{line}")
    return [(where, text) for text, where in places.items()]


def run(program: str) -> subprocess.CompletedProcess[str]:
    """In a new process, without what importing moe_lowering has set in this one's environment."""
    environment = {name: value for name, value in os.environ.items() if name != AUTOLOAD}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(("where", "text"), snippets(), ids=[where for where, _ in snippets()])
def test_snippet_runs_in_a_process_of_its_own(where, text):
    before = "".join(more for line, more in CONTEXT.items() if line in text)
    done = run(RUN_TESTS.format(text=text) if "def test_" in text else before + text)
    assert done.returncode == 0, f"{where}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_the_order_of_imports_matters_without_cann():
    """The twin: torch first fails where torch_npu finds no CANN, and nowhere else."""
    # in a process of its own: the stand-ins that other tests have loaded look like CANN
    cann = run("from moe_lowering._bootstrap import cann_is_installed\nprint(cann_is_installed())").stdout.strip()
    done = run("import torch\nimport moe_lowering")
    assert (done.returncode == 0) == (cann == "True"), done.stderr
    assert ("libhccl.so" in done.stderr) == (done.returncode != 0)
