"""What ``from_groups`` finds on a machine: SoC, CANN, torch_npu, HCCL's buffer. Groups: test_rank_placement.py."""

import importlib.metadata
import sys

import pytest
import torch

from moe_lowering import Deployment, deployment_detection, testing
from moe_lowering.deployment_detection import Detected
from moe_lowering.report.text import render
from moe_lowering.vocabulary import SOCS


def detect(**given):
    return Deployment.from_groups(ep=None, **given)


def source(deployment, field):
    [found] = [d for d in deployment.detected if d.field == field] or [None]
    return found


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in ("HCCL_BUFFSIZE", *deployment_detection._HOMES):
        monkeypatch.delenv(name, raising=False)


def test_what_is_found_is_declared_and_said():
    found = detect(max_tokens=64)
    npu = importlib.metadata.version("torch_npu").partition("+")[0]
    assert (found.soc, found.hccl_buffer_mb, found.torch_npu, found.cann, found.max_tokens) == ("A3", 200, npu, "", 64)
    assert found == Deployment(soc="A3", torch_npu=npu, max_tokens=64)  # where it came from is no part of it
    assert found.digest() == Deployment(soc="A3", torch_npu=npu, max_tokens=64).digest()
    assert source(found, "hccl_buffer_mb") == Detected(
        "hccl_buffer_mb", "200", "HCCL_BUFFSIZE is not set: CANN's default"
    )
    assert source(found, "cann") == Detected("cann", "unknown", "not found")
    assert source(found, "max_tokens") is None


def test_a_given_value_stays_and_a_difference_is_said(monkeypatch):
    monkeypatch.setenv("HCCL_BUFFSIZE", "1024")
    assert detect().hccl_buffer_mb == 1024
    assert source(detect(hccl_buffer_mb=1024), "hccl_buffer_mb") is None
    given = detect(hccl_buffer_mb=512, torch_npu="2.10.0")
    assert (given.hccl_buffer_mb, given.torch_npu) == (512, "2.10.0")
    assert source(given, "hccl_buffer_mb") == Detected("hccl_buffer_mb", "512", "given; HCCL_BUFFSIZE says 1024")
    assert source(given, "torch_npu").source.startswith("given; metadata of torch_npu says ")
    assert source(given.replace(hccl_buffer_mb=256), "hccl_buffer_mb") is None  # no longer what was detected


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "1024MB", "\u0661"])
def test_a_buffer_size_that_is_none(monkeypatch, text):
    monkeypatch.setenv("HCCL_BUFFSIZE", text)
    with pytest.raises(ValueError, match=r"HCCL_BUFFSIZE=.*; accepted: MB, 1 or more"):
        detect()


@pytest.mark.parametrize("soc", SOCS)
def test_socs(monkeypatch, soc):
    name = SOCS[soc].runtime_name
    monkeypatch.setattr(torch.npu, "get_device_name", lambda: name)
    assert detect().soc == detect(soc=soc).soc == soc
    other = next(name for name in SOCS if name != soc)
    with pytest.raises(ValueError, match=f"soc is '{other}', and the NPU is '{name}'; accepted: '{soc}', or no soc"):
        detect(soc=other)


@pytest.mark.parametrize(
    "name", ["Ascend910A", "Ascend910B", "Ascend910ProB", "Ascend310B1", "Ascend960_1", "Ascend910_9", ""]
)
def test_a_soc_that_is_not_known_is_refused_unless_it_is_given(monkeypatch, name):
    monkeypatch.setattr(torch.npu, "get_device_name", lambda: name)
    with pytest.raises(
        ValueError, match=f"the NPU is '{name}', which is none that this package knows; accepted: A2, A3"
    ):
        detect()
    assert source(detect(soc="A2"), "soc").source.startswith("given; torch.npu.get_device_name() is")


def test_without_an_npu_the_soc_must_be_given(monkeypatch):
    monkeypatch.setattr(torch.npu, "is_available", lambda: False)
    with pytest.raises(
        ValueError,
        match=r"soc is not given, and there is no NPU to ask .*; .* 310P, or moe_lowering.simulator.enable",
    ):
        detect()
    assert detect(soc="A5").soc == "A5"
    monkeypatch.delitem(sys.modules, "torch_npu")
    with pytest.raises(ValueError, match="there is no NPU to ask"):
        detect()


@pytest.mark.parametrize(("text", "version"), [
    ("package_name=Ascend-cann-toolkit\nversion=8.5.0\narch=aarch64\n", "8.5.0"),
    ("version=8.2.RC1\n", "8.2.RC1"),
    ("innerversion=V100R001\n", ""),
    ("version=8.5.0.B123\n", "8.5.0.B123"),
    ("version=latest\n", ""),
    ("version=9.x\n", ""),
])  # fmt: skip
def test_cann(monkeypatch, tmp_path, text, version):
    (tmp_path / "aarch64-linux").mkdir()
    file = tmp_path / "aarch64-linux" / "ascend_toolkit_install.info"
    file.write_text(text)
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    assert detect().cann == version
    assert source(detect(), "cann").source == (str(file) if version else "not found")


WRONG = {
    "ep_group": ({"ep": None, "ep_group": "g"}, ValueError, "ep_group is given; accepted: the group itself, as ep"),
    "tp_group": ({"ep": None, "tp_group": "g"}, ValueError, "tp_group is given; accepted: the group itself, as tp"),
    "ep": ({"ep": "g"}, TypeError, "ep is 'g'; accepted: a torch.distributed.ProcessGroup"),
    "not a member": ({"ep": None, "tp": -100}, TypeError, "tp is -100; accepted: a torch.distributed.ProcessGroup"),
    "ep_size": ({"ep": None, "ep_size": 2}, ValueError, "ep_size is 2 but ep_group is ''"),
    "another field": ({"ep": None, "max_tokens": -1}, ValueError, "max_tokens is -1; accepted: 0 or more"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    arguments, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        Deployment.from_groups(**arguments)


def test_the_report_shows_what_was_detected():
    from moe_lowering import MoE

    with testing.fake_tensors():
        model, x = MoE(64, 32, 8, 2), torch.empty(4, 64)
    report = testing.lower_graph(model, x, deployment=detect()).report
    text = render(report)
    assert "the deployment, as it was detected" in text
    assert "200 (HCCL_BUFFSIZE is not set: CANN's default)" in text
    shown = report.to_json()["detected"]
    assert {"field": "soc", "value": "A3", "source": "torch.npu.get_device_name() is 'Ascend910_9391'"} in shown
    plain = testing.lower_graph(model, x, deployment=Deployment(installed=())).report
    assert plain.detected == () and "detected" not in render(plain)


def test_a_fake_group_makes_a_second_one_too():
    import torch.distributed as dist

    with testing.fake_deployment(ep_size=4, ep_rank=2) as fake:
        world = dist.distributed_c10d._get_default_group()
        found = Deployment.from_groups(ep=world)
        assert (found.ep_size, found.ep_rank, found.ep_group) == (4, None, fake.ep_group)
        assert found.mc2_group not in ("", fake.ep_group, fake.mc2_group)
        assert Deployment.from_groups(ep=world, ep_rank=2).ep_rank == 2


@pytest.mark.parametrize(("ranks", "is_accepted"), [("", True), ("1", True), ("2", False)])
def test_no_group_under_torchrun_is_told(monkeypatch, ranks, is_accepted):
    """``dist.group.WORLD`` before ``init_process_group`` is None, which else means that the rank is alone."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("WORLD_SIZE", ranks)
    if is_accepted:
        assert Deployment.from_groups(ep=None, soc="A3").ep_size == 1
        return
    with pytest.raises(
        ValueError, match="ep is None, WORLD_SIZE is 2 and there is no process group; accepted: a group"
    ):
        Deployment.from_groups(ep=None, soc="A3")
