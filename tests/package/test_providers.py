"""A provider that is installed is looked at: version and build, from its files, without importing it."""

import sys

import pytest
import torch

from moe_lowering import Deployment, MoE, testing
from moe_lowering.custom_ops.missing_operators import why_absent
from moe_lowering.passes.implementations.fused_mc2 import TARGETS
from moe_lowering.providers import UNKNOWN, installed_providers, same_version
from moe_lowering.vocabulary import PROVIDERS, SOCS

VLLM = {"fused_mode": 1, "providers": (("vllm_ascend", "0.23.0"),)}
DECODE = {**VLLM, "fused_mode": 2}
MEGA = {"providers": (("cann_ops_transformer", "9.1.0"),), "weight_format": "nd"}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Makes a distribution that cannot be imported, and has this version and build file."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name, version, build=None, editable=False):
        metadata = tmp_path / f"{name}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        )
        home = tmp_path / "source" if editable else tmp_path
        (home / name).mkdir(parents=True)
        (home / name / "__init__.py").write_text("raise RuntimeError('imported')\n")
        if build is not None:
            (home / name / "_build_info.py").write_text(build)
        # the path is the key under which a process remembers what it found
        monkeypatch.setattr(sys, "path", [str(tmp_path), *([str(home)] if editable else []), *sys.path, str(metadata)])

    return make


def judge(comm="fused_mc2", quantisation="none", **fields):
    from moe_lowering import quantise_experts

    with testing.fake_deployment(ep_size=16, max_tokens=128, installed=None, **fields) as where:
        with testing.fake_tensors():
            model = MoE(1024, 512, 64, 4, deployment=where, dtype=torch.bfloat16)
            if quantisation != "none":
                quantise_experts(model, quantisation)
            x = torch.empty(32, 1024, dtype=torch.bfloat16)
        return testing.lower_graph(model, x, deployment=where, comm=comm, policy="auto" if comm == "auto" else "fixed")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_versions_are_read_and_nothing_is_imported(install, provider):
    assert Deployment().installed == ()  # none of them is in the test environment
    install(provider, "0.24.0rc1+ascend")
    build = UNKNOWN if provider == "vllm_ascend" else ""
    assert Deployment().installed == ((provider, "0.24.0rc1", build),)
    assert Deployment(installed=()).installed == ()
    assert Deployment.from_groups(ep=None).providers == ((provider, "0.24.0rc1"),)
    assert provider not in sys.modules
    [detected] = Deployment().detected
    assert detected.field == "installed" and detected.value.startswith(f"{provider} 0.24.0rc1")
    assert Deployment().digest() != Deployment(installed=()).digest()  # a decision may depend on it: ranks compare it


BUILDS = {
    **{soc: (f"# Auto-generated file\n__device_type__ = '{soc}'\n", soc) for soc in SOCS},
    "vllm-ascend's word": ("__device_type__ = '_310P'\n", "310P"),
    "a new one": ("__device_type__ = 'A7'\n", UNKNOWN),
    "computed": ("import os\n__device_type__ = os.environ['X']\n", UNKNOWN),
    "no such name": ("__soc_version__ = 'ASCEND910B1'\n", UNKNOWN),
    "not Python": ("__device_type__ = \n", UNKNOWN),
    "no file": (None, UNKNOWN),
}


@pytest.mark.parametrize("case", BUILDS)
@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_builds(install, case, editable):
    text, build = BUILDS[case]
    install("vllm_ascend", "0.23.0", text, editable)
    [package] = installed_providers()
    assert package.record == ("vllm_ascend", "0.23.0", build)
    assert package.where.endswith("_build_info.py")


@pytest.mark.parametrize("case", BUILDS)
def test_a_build_for_another_soc_has_no_fused_operators(install, case):
    text, build = BUILDS[case]
    install("vllm_ascend", "0.23.0", text)
    lowered = judge(**VLLM)
    if build == "A3":
        testing.assert_lowered(lowered, comm="fused_mc2", ops=["moe_lowering.dispatch_ffn_combine"])
        return
    testing.assert_refused(lowered, comm="fused_mc2", code="fused.provider_build")
    [violation] = lowered.report.blocks[0].verdicts["fused_mc2"].violations
    assert f"was built for SoC {build}, and this is A3" in violation.message
    assert "build vllm-ascend from source on the A3 machine" in violation.advice


def target_cases():
    fields = {
        "dispatch_ffn_combine": (VLLM, "none"),
        "dispatch_gmm_combine_decode": (DECODE, "w8a8"),
        "mega_moe": (MEGA, "none"),
    }
    return [(target.name, target.provider, *fields[target.name]) for target in TARGETS]


@pytest.mark.parametrize(("name", "provider", "fields", "quantisation"), target_cases())
def test_another_version_than_is_declared(install, name, provider, fields, quantisation):
    [(_, declared)] = fields["providers"]
    install(provider, "0.99.1", "__device_type__ = 'A3'")
    lowered = judge("auto", quantisation, **fields)
    code = ("mega_moe" if name == "mega_moe" else "fused") + ".provider_version"
    testing.assert_refused(lowered, comm="fused_mc2", code=code)
    assert lowered.report.blocks[0].comm not in (None, "fused_mc2")
    messages = [v.message for v in lowered.report.blocks[0].verdicts["fused_mc2"].violations if v.code == code]
    assert f"{name}: {provider} 0.99.1 is installed, and the deployment declares {declared}" in messages


@pytest.mark.parametrize(("name", "provider", "fields", "quantisation"), target_cases())
def test_the_version_that_is_declared(install, name, provider, fields, quantisation):
    [(_, declared)] = fields["providers"]
    install(provider, f"{declared}+local", "__device_type__ = 'A3'")
    codes = {v.code for v in judge("auto", quantisation, **fields).report.blocks[0].verdicts["fused_mc2"].violations}
    assert not any(".provider" in code for code in codes)


REMOVED = "removed in 0.24.0rc1, 0.13 to 0.23 have it"


@pytest.mark.parametrize("version", ["0.24.0rc1", "0.24.0", "0.26.0rc1", "0.30.0rc2", "1.0"])
def test_what_a_version_removed_is_said_by_name_and_version(install, version):
    """By the verdict, and by the wrapper's device kernel."""
    install("vllm_ascend", version, "__device_type__ = 'A3'")
    said = f"vllm_ascend {version} has no dispatch_gmm_combine_decode: {REMOVED}"
    fields = {**DECODE, "providers": (("vllm_ascend", version),)}
    lowered = judge("auto", "w8a8", **fields)
    testing.assert_refused(lowered, comm="fused_mc2", code="fused_decode.removed")
    [violation] = [v for v in lowered.report.blocks[0].verdicts["fused_mc2"].violations if v.code.endswith(".removed")]
    assert said in violation.message and "Deployment.fused_mode to 1" in violation.advice
    assert said in why_absent("dispatch_gmm_combine_decode") and "install vllm-ascend" not in why_absent(
        "dispatch_gmm_combine_decode"
    )
    assert f"vllm_ascend {version}, built for A3 is installed and not loaded" in why_absent("dispatch_ffn_combine")


@pytest.mark.parametrize("version", ["0.23.0", "0.23.0.post1", "0.13.0"])
def test_what_a_version_has_is_not_said_to_be_removed(install, version):
    install("vllm_ascend", version, "__device_type__ = 'A3'")
    fields = {**DECODE, "providers": (("vllm_ascend", version),)}
    codes = {v.code for v in judge("auto", "w8a8", **fields).report.blocks[0].verdicts["fused_mc2"].violations}
    assert "fused_decode.removed" not in codes
    assert f"{version}, built for A3 is installed and not loaded; import vllm_ascend.vllm_ascend_C" in why_absent(
        "dispatch_gmm_combine_decode"
    )


@pytest.mark.parametrize("installed", [False, True])
def test_a_library_without_the_operator(install, installed):
    if installed:
        install("vllm_ascend", "0.23.0", "__device_type__ = 'A2'")
    assert "is loaded" not in why_absent("dispatch_ffn_combine")
    with torch.library._scoped_library("_C_ascend", "FRAGMENT") as library:
        library.define("another(Tensor x) -> Tensor")
        text = why_absent("dispatch_ffn_combine")
    whose = "vllm_ascend 0.23.0, built for A2" if installed else "a vllm-ascend whose version is not known"
    assert f"the library of {whose} is loaded and has no such operator" in text


def test_without_a_version_the_constraint_is_said():
    verdict = judge("auto", "w8a8", fused_mode=2, providers=()).report.blocks[0].verdicts["fused_mc2"]
    assert any(
        f"vllm_ascend>=0.24 has no dispatch_gmm_combine_decode: {REMOVED}" in v.message for v in verdict.violations
    )


def test_what_is_installed_and_not_declared_does_not_matter(install):
    install("vllm_ascend", "0.1.0", "__device_type__ = 'A2'")
    install("sgl_kernel_npu", "1.0")
    codes = {v.code for v in judge("auto", **MEGA).report.blocks[0].verdicts["fused_mc2"].violations}
    assert not any(".provider" in code for code in codes)


@pytest.mark.parametrize(("a", "b", "same"), [
    ("0.23.0", "0.23", True), ("v0.23.0", "0.23.0+cpu", True), ("0.23.0", "0.23.0.post1", False),
    ("0.24.0rc1", "0.24.0", False), ("0.24.0rc1", "0.24.0.RC1", True), ("0.23.0", "0.23.1", False), ("10.0", "1", False),
])  # fmt: skip
def test_same_version(a, b, same):
    assert same_version(a, b) == same_version(b, a) == same


@pytest.mark.parametrize("wrong", [
    "vllm_ascend", [], (("vllm_ascend", "0.23.0"),), (("vllm", "0.23.0", ""),), (("vllm_ascend", "", ""),),
    (("vllm_ascend", "0.23.0", "A7"),), (("vllm_ascend", 0.23, "A3"),),
])  # fmt: skip
def test_installed_is_checked(wrong):
    with pytest.raises(ValueError, match=r"installed is .*; accepted: triples"):
        Deployment(installed=wrong)
