"""The simulator's libraries: how they are built and loaded, what they refuse, and that npugraph_ex runs on them.

What needs a fresh process runs in one, with no environment variable that torch_npu or the simulator reads.
"""

from __future__ import annotations

import warnings

import pytest
from fresh_processes import finish, start
from rank_pools import Ranks

from moe_lowering import Deployment, MoeLowering, _versions, simulator

FORCE_EAGER = {"force_eager": True}


# Enabling


@pytest.mark.parametrize(
    ("soc", "first", "name", "number"),
    [  # the numbers are torch_npu's SocVersion
        ("A2", "moe_lowering", "Ascend910B3", 223),
        ("A3", "torch", "Ascend910_9391", 250),
        ("A5", "moe_lowering", "Ascend950DT_9591", 260),
        ("310P", "torch", "Ascend310P3", 202),
    ],
)
def test_enable_gives_torch_npu_the_soc(soc, first, name, number):
    """Before ``import torch`` and after it (then moe_lowering comes first, which turns the autoload off)."""
    process = start(f"""
        import sys
        import moe_lowering.simulator as simulator
        assert "torch_npu" not in sys.modules and not simulator.is_enabled()
        if {first!r} == "torch":
            import torch
        simulator.enable({soc!r})
        simulator.enable({soc!r})
        import torch, torch_npu
        from torch_npu.npu._backends import get_soc_version
        try:
            simulator.enable("A2" if {soc!r} == "A3" else "A3")
        except simulator.SimulatorError as error:
            print(error)
        print(simulator.soc(), simulator.is_enabled(), torch.npu.get_device_name(0), get_soc_version())
        """)
    out, err = finish(process)
    refused, state = out.splitlines()  # nothing else is printed: the warning about ASCEND_HOME_PATH is held back
    assert state == f"{soc} True {name} {number}"
    assert f"simulates {soc} and cannot change to {'A2' if soc == 'A3' else 'A3'}" in refused
    assert err == ""


def test_without_the_simulator_torch_npu_does_not_import():
    """The twin of the test above: what it shows is due to ``enable()``."""
    process = start("import moe_lowering, torch_npu")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "libhccl.so" in err or "libascendcl.so" in err


def test_enable_can_be_repeated_after_an_error():
    """The libraries are loaded by then: they must not be taken for CANN. Children of the process can import torch."""
    process = start("""
        import subprocess, sys
        import moe_lowering.simulator as simulator
        register, simulator._register_kernels = simulator._register_kernels, lambda: 1 / 0
        try:
            simulator.enable()
        except ZeroDivisionError:
            print(simulator.is_enabled())
        try:
            simulator.soc()
        except simulator.SimulatorError as error:
            print(error)
        simulator._register_kernels = register
        simulator.enable()
        print(simulator.is_enabled(), subprocess.run([sys.executable, "-c", "import torch"]).returncode)
        """)
    before, soc, after = finish(process)[0].splitlines()
    assert (before, after) == ("False", "True 0")
    assert "not enabled in this process" in soc


def test_what_is_not_simulated_fails_by_name():
    """Device memory works; an operator on it must raise where it is called, not give what was in memory."""
    process = start("""
        import moe_lowering.simulator
        moe_lowering.simulator.enable()
        import torch
        x = torch.arange(12.).reshape(3, 4)
        on_npu = x.npu()
        assert on_npu.device.type == "npu" and torch.equal(on_npu.cpu(), x)
        event = torch.npu.Event()
        event.record(torch.npu.Stream())
        event.synchronize()
        for operation in (lambda: on_npu + 1, lambda: on_npu.to(torch.bfloat16), lambda: on_npu.t().contiguous()):
            try:
                operation()
            except RuntimeError as error:
                print("aclopCompileAndExecute is not simulated" in str(error), "enable_device() in its place" in str(error))
        try:
            torch.compile(torch.nn.functional.silu, backend="npugraph_ex")(x)
        except RuntimeError as error:
            print('options={"force_eager": True}' in str(error) and "enable_device() in place of enable()" in str(error))
        moe_lowering.simulator.enable_device()  # the way out that the errors name: it computes
        print((on_npu + 1).sum().item() == 78)
        for operation in (lambda: torch.ops.npu.npu_fast_gelu(on_npu), lambda: x.to("npu:1")):
            try:
                operation()
            except RuntimeError as error:
                print("aclopCompileAndExecute is not simulated" in str(error), "enable_device()" in str(error))
                print("there is no device npu:1; accepted: npu:0 to npu:0" in str(error))
        """)
    said = finish(process)[0].split()
    assert said == ["True"] * 8 + ["True", "False", "False"] + ["False", "False", "True"]


# npugraph_ex


def test_npugraph_ex_compiles_for_cpu():
    """Static and dynamic, collectives of a fake group included; the hook sees the graph; numbers are eager's."""
    process = start("""
        import moe_lowering.simulator
        moe_lowering.simulator.enable()
        import torch, torch.distributed as dist
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
        group, c10d = dist.group.WORLD.group_name, torch.ops._c10d_functional

        def function(x, w):
            y = torch.nn.functional.silu(x @ w)
            gathered = c10d.wait_tensor(c10d.all_gather_into_tensor(y, 4, group))
            return c10d.wait_tensor(c10d.reduce_scatter_tensor(gathered + 1, "sum", 4, group)) * 2

        for dynamic in (False, True):
            torch._dynamo.reset()
            graphs = []
            options = {"force_eager": True, "post_grad_custom_pre_pass": lambda gm, inputs, config: graphs.append(gm)}
            compiled = torch.compile(function, backend="npugraph_ex", options=options, dynamic=dynamic, fullgraph=True)
            for tokens in (4, 8, 12):
                x, w = torch.randn(tokens, 16), torch.randn(16, 16)
                torch.testing.assert_close(compiled(x, w), function(x, w), rtol=0, atol=0)
            targets = {str(node.target) for node in graphs[0].graph.nodes}
            assert "_c10d_functional.all_gather_into_tensor.default" in targets, targets
            assert "_c10d_functional.reduce_scatter_tensor.default" in targets, targets
            print(len(graphs))
        """)
    assert finish(process)[0].split() == ["3", "1"]


def gather_and_scatter(rank: int) -> tuple[list[float], list[float]]:
    import torch
    import torch.distributed as dist

    group, c10d = dist.group.WORLD.group_name, torch.ops._c10d_functional

    def function(x: torch.Tensor) -> torch.Tensor:
        gathered = c10d.wait_tensor(c10d.all_gather_into_tensor(x * 2, 2, group))
        return c10d.wait_tensor(c10d.reduce_scatter_tensor(gathered + rank, "sum", 2, group))

    compiled = torch.compile(function, backend="npugraph_ex", options=FORCE_EAGER, fullgraph=True)
    x = torch.tensor([1.0, 2.0]) + 10 * rank
    return compiled(x).tolist(), function(x).tolist()


def test_npugraph_ex_runs_collectives_of_a_gloo_group():
    """Rank r receives its own 2x from both ranks, plus 0 and 1."""
    with Ranks(2, setup=simulator.enable) as ranks:
        results = ranks.run(gather_and_scatter)
    assert results[0] == ([5.0, 9.0], [5.0, 9.0])
    assert results[1] == ([45.0, 49.0], [45.0, 49.0])


# Versions


def test_untested_versions_warn_once(monkeypatch):
    monkeypatch.setattr(_versions, "_warned", False)
    monkeypatch.setattr(_versions, "installed_version", {"torch": "2.130.0", "torch_npu": "2.9.0.post4"}.__getitem__)
    with pytest.warns(RuntimeWarning) as caught:
        MoeLowering(Deployment())  # wherever the pass runs: each way makes one
        MoeLowering(Deployment())
    assert [str(warning.message) for warning in caught] == [
        "moe_lowering was not tested with torch 2.130.0 and torch_npu 2.9.0.post4 "
        "(tested: 2.10 with 2.10.0, 2.11 with 2.11.0, 2.12 with 2.12.0, 2.13 with 2.13.0, 2.14 with 2.14.0)"
    ]


@pytest.mark.parametrize(
    ("torch", "torch_npu", "said"),
    [
        ("2.13.0", "2.14.0", "torch 2.13.0 and torch_npu 2.14.0 ("),  # each tested, not together
        ("2.14.0", "2.14.1", "torch 2.14.0 and torch_npu 2.14.1 ("),
        ("2.15.0", "", "torch 2.15.0 (tested"),
        ("2.1.0", "", "torch 2.1.0 (tested"),
    ],
)
def test_a_pair_that_was_not_tested_is_named(monkeypatch, torch, torch_npu, said):
    monkeypatch.setattr(_versions, "installed_version", {"torch": torch, "torch_npu": torch_npu}.__getitem__)
    assert _versions.describe_untested_pair().startswith(said)


INSTALLED = [(f"{torch}.0{build}", npu) for torch, npu in _versions.TESTED for build in ("", "+cpu")]


@pytest.mark.parametrize(("torch", "torch_npu"), [*INSTALLED, ("2.13.0", "2.13.0.post1"), ("2.10.0+cpu", "")])
def test_tested_versions_do_not_warn(monkeypatch, torch, torch_npu):
    monkeypatch.setattr(_versions, "_warned", False)
    monkeypatch.setattr(_versions, "installed_version", {"torch": torch, "torch_npu": torch_npu}.__getitem__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _versions.warn_if_untested()
