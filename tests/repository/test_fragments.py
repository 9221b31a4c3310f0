"""Python lines of the pages that speak of the reader's own model or ranks: they run as they stand, behind what they speak of.

Whole programs are in ``test_snippets``. These stand indented on a page. Which they are is found, not listed: an indented block
that parses as Python and has no context here fails.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from page_text import indented_code

TOP = Path(__file__).parents[2]
PAGES = [TOP / "README.md", TOP / "CONTRIBUTING.md", *sorted((TOP / "docs").glob("*.md"))]
# A line that can only be Python's, if the block is code
PYTHON_LINE = re.compile(
    r"^\s*(?:(?:import|from|def|class|with|for|assert|return|async) .*:?|[\w.\[\]]+(?:, [\w.]+)* = .*|\w+=[\[{(].*"
    r"|[\w.]+\(.*|@\w.*)$",
    re.M,
)
# Blocks with such a line that are no Python: a schema, a command beside a call
NO_PYTHON = (
    "route(Tensor logits",
    'LLM(model, additional_config={"moe_lowering": {}})\nvllm serve',
)

# A rank whose partner failed before it came here is not waited for by gloo's half an hour
GROUP = """
import datetime, torch.distributed as dist
timeout = datetime.timedelta(seconds=60)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
"""
MODEL = """
import moe_lowering, tempfile, torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
config = Qwen3MoeConfig(vocab_size=96, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2)
torch.manual_seed(0)
model = Qwen3MoeForCausalLM(config).eval()
"""
DEPLOYMENT = "from moe_lowering import Deployment\n"
ON_DEVICE = "import moe_lowering.simulator\nmoe_lowering.simulator.enable_device()\nimport torch\n"
# What stands before a fragment, and what must hold behind it, by words of the fragment; and on how many ranks it runs.
CONTEXT = {
    "Deployment.from_mesh(mesh": (
        DEPLOYMENT + GROUP + "from torch.distributed.device_mesh import init_device_mesh\n"
        'mesh = init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=("ep", "dp", "tp"))\n'
        "ep_group, tp_group = dist.group.WORLD, dist.new_group([0])\n",
        "assert (deployment.ep_size, deployment.tp_size, deployment.max_tokens) == (1, 1, 0)\n",
        1,
    ),
    "Deployment.from_groups(ep=group, max_tokens=128": (
        'import os\nos.environ["HCCL_BUFFSIZE"] = "1024"\n' + DEPLOYMENT + GROUP + "group = dist.group.WORLD\n",
        "assert (deployment.hccl_buffer_mb, deployment.max_tokens, deployment.ep_size) == (1024, 128, 2)\n",
        2,
    ),
    "DistributedConfig(tp_size=2": (
        MODEL + GROUP + 'torch._C._get_accelerator = lambda: torch.device("cpu")\n'  # not the simulated device
        "folder = [tempfile.mkdtemp()]\ndist.broadcast_object_list(folder)\n(folder,) = folder\n"
        "if rank == 0:\n    model.save_pretrained(folder)\ndist.barrier()\n",
        "with torch.inference_mode():\n    compiled(input_ids=torch.arange(32).reshape(2, 16), use_cache=False)\n"
        "assert [block.comm for block in lowering.reports[0].blocks] == ['allgather']\n",
        2,
    ),
    "drop_unit_smooth_scales(model)": (
        MODEL + 'model.register_buffer("smooth_scale", torch.ones(4))\n',
        "assert model.smooth_scale is None\n",
        1,
    ),
    "Server(model, buckets=(2, 4)": (
        ON_DEVICE + MODEL + "from moe_lowering.integrations.transformers import register\n"
        "from moe_lowering.serving import Request, Server\nregister()\n"
        'model = model.to("npu")\nmodel.set_experts_implementation("moe_lowering")\n',
        "assert [len(result.tokens) for result in results] == [20, 5, 12]\n",
        1,
    ),
    "simulator.enable_device()": (
        "",
        "import torch\nassert (torch.ones(3).npu() * 2).sum().item() == 6\n",
        1,
    ),
    "npu_format_cast": (
        ON_DEVICE + MODEL + "import torch_npu\nfrom moe_lowering.integrations.transformers import register\nregister()\n"
        'model = model.to(torch.bfloat16).requires_grad_(False).to("npu")\n'
        'model.set_experts_implementation("moe_lowering")\n'
        'moe_lowering.shard_experts(model, moe_lowering.Deployment(soc="A3", max_tokens=64, weight_format="nz"))\n'
        "cast, formats = torch_npu.npu_format_cast, []\n"  # the simulated device has none
        "torch_npu.npu_format_cast = lambda weight, format: formats.append(format) or cast(weight, format)\n",
        "assert formats == [29, 29]\n",
        1,
    ),
    "additional_config={": ("", "assert additional_config\n", 1),
    "moe_lowering.interruptible()": (
        "import moe_lowering, torch\ncompiled, inputs, seen = lambda x: seen.append(x), (1,), []\n",
        "assert seen == [1]\n",
        1,
    ),
    "torch.npu.NPUGraph()": (
        ON_DEVICE + 'model = torch.nn.Linear(4, 4).to("npu")\nx = torch.ones(2, 4).npu()\n',
        "import moe_lowering\nassert torch.allclose(y, model(x)) and torch.allclose(fast(x), y)\n",
        1,
    ),
    "get_hccl_comm_name": (
        ON_DEVICE + DEPLOYMENT + GROUP.replace('"gloo"', '"hccl"')
        + "group = dist.group.WORLD\nsecond = dist.new_group([0])\n",
        "assert deployment.mc2_group == backend.get_hccl_comm_name(0)\n",
        1,
    ),
    "from_pretrained(folder, experts_implementation": (
        MODEL + "folder = tempfile.mkdtemp()\nmodel.save_pretrained(folder)\n",
        "assert model.config._experts_implementation == 'moe_lowering'\n",
        1,
    ),
}  # fmt: skip


# The first rank is through at once, and must be there still when the other looks, as while gloo connects
EARLY = """
import os, time
if rank == 0:
    store.set("process", str(os.getpid()))
else:
    process = int(store.get("process"))
    time.sleep(0.5)
    os.kill(process, 0)
"""


def is_python(text: str) -> bool:
    """Whether it parses, and does something: a line of names with commas, as of a CSV file, is none."""
    try:
        body = ast.parse(text).body
    except SyntaxError:
        return False
    return any(not isinstance(each, ast.Expr) or isinstance(each.value, ast.Call) for each in body)


def is_broken(text: str) -> bool:
    """Whether it looks like Python and is none, nor one of ``NO_PYTHON``."""
    return not is_python(text) and bool(PYTHON_LINE.search(text)) and not any(words in text for words in NO_PYTHON)


BLOCKS = {f"{page.name}:{line}": text for page in PAGES for line, text in indented_code(page.read_text()).items()}
FRAGMENTS = {name: text for name, text in BLOCKS.items() if is_python(text)}


def context_of(text: str) -> tuple[str, str, int] | None:
    return next((context for words, context in CONTEXT.items() if words in text), None)


@pytest.fixture(scope="module")
def outcomes():
    """Exit codes of all fragments, of a twin of the first whose check must fail, and of ranks that end at different times;
    what they said."""
    programs = []
    for name, text in FRAGMENTS.items():
        before, behind, ranks = context_of(text) or ("", "", 1)
        programs.append((name, before + text + behind, ranks))
    programs.append(("twin", programs[0][1] + "assert False\n", 1))
    programs.append(("early", EARLY, 2))
    command = [sys.executable, str(TOP / "tests" / "helpers" / "fragment_process.py")]
    done = subprocess.run(command, input=json.dumps(programs), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.parametrize("name", FRAGMENTS)
def test_a_fragment_runs_behind_what_it_speaks_of(outcomes, name):
    codes, said = outcomes
    assert context_of(FRAGMENTS[name]) is not None, "say what it speaks of in CONTEXT"
    assert set(codes[name]) == {0}, said[-6000:]


def test_a_fragment_that_fails_is_seen(outcomes):
    assert outcomes[0]["twin"] == [1]


def test_a_rank_that_is_through_waits_for_the_others(outcomes):
    assert outcomes[0]["early"] == [0, 0], outcomes[1][-6000:]


def test_no_block_is_broken_python():
    assert [name for name, text in BLOCKS.items() if is_broken(text)] == []
    for text in FRAGMENTS.values():
        last = max(text.rfind(bracket) for bracket in ")]}")
        assert is_broken(text[:last] + text[last + 1 :])


def test_every_context_is_of_a_fragment():
    texts = "\n".join(FRAGMENTS.values())
    assert all(words in texts for words in CONTEXT)
    assert all(any(words in text for text in BLOCKS.values()) for words in NO_PYTHON)
    assert not any(map(is_python, ("make demo", "moe-lowering explain moe --ep 2", "soc,what,us\nA3,send,1.5")))
