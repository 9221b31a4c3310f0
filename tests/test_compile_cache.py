"""npugraph_ex's compile cache across processes: what was lowered for one deployment, limits and pass is never taken for
another, what is the same is found again, and a graph from the cache, which has no guards, still refuses other sizes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import moe_lowering
from moe_lowering import Deployment, MoeLowering
from moe_lowering.backends import cache_key
from moe_lowering.backends.cache_key import cache_digest, flat_hook

TESTS = Path(__file__).parent
PACKAGE = Path(moe_lowering.__file__).parent
OUTSIDE = "assert_tokens: T is 17, but this graph was lowered for T from 2 to 16"


def run(package: Path, folder: Path, **fields: Any) -> dict[str, Any]:
    """What one process reports that compiles, or loads, ``cached_model.Model`` for a deployment, with T = 6, 9, 17."""
    command = [sys.executable, str(TESTS / "cached_model.py"), str(folder), json.dumps(fields), "6", "9", "17"]
    environment = {"PYTHONPATH": str(package.parent), "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert answer["from"] == str(package / "__init__.py")
    return answer


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package that nobody edits meanwhile: its sources are part of the key."""
    copy = tmp_path_factory.mktemp("copy") / "moe_lowering"
    return shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))


@pytest.fixture(scope="module")
def filled(package: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("cache")
    return folder, run(package, folder, max_tokens=16)


def test_another_process_finds_the_graph_and_it_refuses_what_it_was_not_made_for(package, filled):
    folder, first = filled
    assert (first["lowered"], len(first["files"])) == (1, 1)
    again = run(package, folder, max_tokens=16)
    assert again["lowered"] == 0, "the pass ran: the graph was not found"
    assert again["files"] == first["files"]
    for answers in (first["answers"], again["answers"]):
        assert max(answers[:2]) < 1e-6
        assert OUTSIDE in answers[2]


def test_another_deployment_gets_a_graph_of_its_own(package, filled):
    folder, first = filled
    other = run(package, folder, max_tokens=17)
    assert other["lowered"] == 1
    assert set(first["files"]) < set(other["files"])
    assert max(other["answers"]) < 1e-6


def test_another_limit_gets_a_graph_of_its_own(package, filled, tmp_path):
    folder, first = filled
    changed = shutil.copytree(package, tmp_path / "moe_lowering")
    table = changed / "limits" / "data" / "activations.toml"
    table.write_text(table.read_text() + "\n# another limit\n")
    other = run(changed, folder, max_tokens=16)
    assert other["lowered"] == 1
    assert set(first["files"]) < set(other["files"])


def digest(own: Any = None, comm: str = "auto", policy: str = "auto", cost: Any = None, **fields: Any) -> str:
    options = {} if cost is None else {"cost": cost}
    return cache_digest(MoeLowering(Deployment(**fields), comm, policy=policy, **options), own)


def user_pass(gm: Any, example_inputs: Any, config: Any) -> None:
    gm.graph.lint()


def test_everything_a_lowered_graph_depends_on_changes_the_digest(monkeypatch):
    two = {"ep_size": 2, "ep_group": "ep", "mc2_group": "mc2"}
    different = [
        digest(),
        digest(own=user_pass),
        digest(own=print),
        digest(comm="mc2"),
        digest(policy="vllm_ascend_main"),
        digest(cost=lambda implementation, load: 1.0),
        digest(cost=lambda implementation, load: 2.0),
        digest(**two),
        digest(**two, ep_rank=1),
        digest(**{**two, "mc2_group": "other"}),
        digest(soc="A2"),
        digest(capture=False),
        cache_digest(MoeLowering(Deployment(), strict=True)),
    ]
    assert len(set(different)) == len(different)
    assert digest(own=user_pass) == different[1]
    monkeypatch.setattr(cache_key, "code_digest", lambda: "other code")
    assert digest() != different[0]


def test_the_hook_names_its_digest_in_its_code_and_nothing_else():
    """npugraph_ex hashes ``dis.dis(hook)``: no address, no closure, no nested function."""
    lowering = MoeLowering(Deployment())
    hook, again = flat_hook(lowering), flat_hook(lowering)
    assert cache_digest(lowering) in hook.__code__.co_consts
    assert hook.__code__ == again.__code__
    assert hook.__closure__ is None
    assert not any(hasattr(constant, "co_code") for constant in hook.__code__.co_consts)
