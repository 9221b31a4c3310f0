"""npugraph_ex's compile cache across processes: what was lowered for one deployment, limits and pass is never taken for
another, what is the same is found again, and a graph from the cache, which has no guards, still refuses other sizes."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import moe_lowering
from moe_lowering import Deployment, MoE, MoeLowering, npugraph_ex_options, testing
from moe_lowering.backends import cache_key
from moe_lowering.backends.cache_key import cache_digest, flat_hook

TESTS = Path(__file__).parents[1] / "helpers"
PACKAGE = Path(moe_lowering.__file__).parent
OUTSIDE = "assert_tokens: T is 17, but this graph was lowered for T from 2 to 16"


def run(package: Path, folder: Path, **fields: Any) -> dict[str, Any]:
    """What one process reports that compiles, or loads, ``cached_model.Model`` for a deployment, with T = 6, 9, 17."""
    command = [sys.executable, str(TESTS / "compile_cache_process.py"), str(folder), json.dumps(fields), "6", "9", "17"]
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


def test_the_digest_of_the_code_has_the_versions_that_ranks_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that an older torch_npu's process has stored says that version to the other ranks."""
    before = cache_key.code_digest()
    monkeypatch.setattr(cache_key, "installed_version", lambda name: "2.99.0" if name == "torch_npu" else "")
    cache_key.code_digest.cache_clear()
    after = cache_key.code_digest()
    cache_key.code_digest.cache_clear()
    assert after != before


class Preferring:
    """A cost function with state."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, implementation: str, load: Any) -> float:
        return float(implementation != self.name)


def preferring(name: str) -> Any:
    def cost(implementation: str, load: Any) -> float:
        return min(float(other != name) for other in [implementation])  # a nested function, which has an address

    return cost


def with_default(name: str) -> Any:
    def cost(implementation: str, load: Any, name: str = name) -> float:
        return float(implementation != name)

    return cost


def by_partial(name: str) -> Any:
    return functools.partial(lambda name, implementation, load: float(implementation != name), name)


FACTOR = 1.0


def scaled(implementation: str, load: Any) -> float:
    return FACTOR * len(implementation)


@pytest.mark.parametrize("make", [Preferring, preferring, with_default, by_partial])
def test_what_a_callable_of_the_users_holds_is_part_of_the_digest(make):
    """The same code with another value, in a closure, a default, a partial or an instance."""
    assert digest(cost=make("mc2")) != digest(cost=make("allgather"))
    assert digest(cost=make("mc2")) == digest(cost=make("mc2"))
    assert digest(own=make("mc2")) != digest(own=make("allgather"))


def test_a_global_that_a_cost_function_reads_is_part_of_the_digest(monkeypatch):
    before = digest(cost=scaled)
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    assert digest(cost=scaled) != before


def test_what_cannot_be_written_down_is_never_found_again(caplog):
    """A compile more, and never another's graph; ``cache_key`` is how an object says what it stands for."""

    class Held:
        def __reduce_ex__(self, protocol):
            raise TypeError("no")

    assert digest(own=Preferring(Held())) != digest(own=Preferring(Held()))
    assert "cannot be part of a cache key" in caplog.text
    named = [Preferring(Held()) for _ in range(3)]
    for each, key in zip(named, ("a", "a", "b"), strict=True):
        each.cache_key = key
    first, same, other = (digest(own=each) for each in named)
    assert first == same != other


def test_a_nested_function_has_the_same_digest_in_another_process():
    """Its address differs from process to process, and so would the text of its bytecode."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import moe_lowering.simulator as s; s.enable('A3');"
        "import test_compile_cache as t; print(t.digest(cost=t.preferring('mc2')))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    environment = {"PYTHONPATH": str(PACKAGE.parent), "PATH": "/usr/bin:/bin", "HOME": "/tmp", "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.stdout.strip() == digest(cost=preferring("mc2")), done.stderr


def test_torchs_own_caches_never_answer_for_the_pass(monkeypatch):
    """AOTAutograd's cache keeps what serialisable compilers made; npugraph_ex's is none, so every compile runs the pass."""
    with testing.fake_deployment(ep_size=1) as first:
        counters.clear()
        torch._dynamo.reset()
        model, lowered = MoE(64, 32, 4, 2), []
        for deployment in (first, first, first.replace(max_tokens=64)):
            lowering = MoeLowering(deployment)
            options = npugraph_ex_options(deployment, lowering=lowering, force_eager=True)
            torch._dynamo.reset()
            with (
                torch._functorch.config.patch(enable_autograd_cache=True, strict_autograd_cache=False),
                torch.no_grad(),
            ):
                torch.compile(model, backend="npugraph_ex", options=options)(torch.randn(6, 64))
            lowered.append([block.comm for report in lowering.reports for block in report.blocks])
        assert lowered == [["allgather"]] * 3
        assert not counters["aot_autograd"].get("autograd_cache_hit")
        assert not counters["aot_autograd"].get("autograd_cache_saved")


def test_the_hook_names_its_digest_in_its_code_and_nothing_else():
    """npugraph_ex hashes ``dis.dis(hook)``: no address, no closure, no nested function."""
    lowering = MoeLowering(Deployment())
    hook, again = flat_hook(lowering), flat_hook(lowering)
    assert cache_digest(lowering) in hook.__code__.co_consts
    assert hook.__code__ == again.__code__
    assert hook.__closure__ is None
    assert not any(hasattr(constant, "co_code") for constant in hook.__code__.co_consts)
