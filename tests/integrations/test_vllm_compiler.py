"""The plugin of vLLM and the compiler: which engines use it, both ways to compile, and a pre-pass of somebody else's. What is
asked of vllm-ascend stands in for it."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from moe_lowering import Deployment, MoE
from moe_lowering.backends.npugraph_ex import PRE_PASS
from moe_lowering.integrations import vllm, vllm_engine
from moe_lowering.integrations.vllm_refusals import Refused

RANGE = SimpleNamespace(start=1, end=256)


class Compiler:
    def compute_hash(self, vllm_config):
        return "hash"

    def load(self, handle):
        return handle


@pytest.fixture
def compile_with(monkeypatch):
    """``compile_with(settings, before, instead)``: compile a graph without experts, with a pre-pass of the user's set before
    vllm-ascend's options or instead of them."""
    monkeypatch.setattr(vllm, "_taken", {"mlp.experts": ""})
    monkeypatch.setattr(vllm, "_deployment", Deployment(soc="A3", max_tokens=256, guards="forbid"))

    def run(settings, before=None, instead=None):
        def set_options(config, given):
            vars(config).update(given["options"])

        def configure(config, ascend_config, vllm_config, process_kwargs_options=None):
            process_kwargs_options(config, {"options": {"force_eager": True}})

        def npugraph_ex_compile(graph, inputs, compiler_config, vllm_config, ascend_config, compile_range):
            config = SimpleNamespace(**{PRE_PASS: before})
            module._configure_backend(config, ascend_config, vllm_config, process_kwargs_options=set_options)
            if instead is not None:
                setattr(config, PRE_PASS, instead)
            getattr(config, PRE_PASS)(graph, inputs, config)
            return "compiled"

        module = SimpleNamespace(
            AscendCompiler=type("AscendCompiler", (Compiler,), dict(vars(Compiler))),
            _configure_backend=configure,
            npugraph_ex_compile=npugraph_ex_compile,
            fusion_pass_compile=None,
        )
        vllm._watch_compiler(module)
        graph = make_fx(lambda x: x + 1)(torch.ones(2))
        config = SimpleNamespace(additional_config={"moe_lowering": settings})
        return module.npugraph_ex_compile(graph, [torch.ones(2)], {}, config, None, RANGE)

    return run


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_a_pre_pass_that_was_there_runs_before_ours(compile_with, caplog, own, strict):
    ran = []
    assert compile_with({"strict": strict}, before=(lambda *_: ran.append(1)) if own else None) == "compiled"
    assert len(ran) == own and "pass_not_run" not in caplog.text


def test_a_pre_pass_instead_of_ours_is_told(compile_with, caplog):
    told = r"\[vllm.pass_not_run\] post_grad_custom_pre_pass is another one than the plugin's.*accepted: "
    with pytest.raises(ValueError, match=rf"moe_lowering \(strict\): {told}"):
        compile_with({"strict": True}, instead=lambda *_: None)
    assert not caplog.records
    assert compile_with({}, instead=lambda *_: None) == "compiled"
    assert "[vllm.pass_not_run]" in caplog.text
    caplog.clear()  # where the plugin is off or took nothing over, the pre-pass is nobody's business
    assert compile_with({"enable": False}, instead=lambda *_: None) == "compiled" and not caplog.records


def trace(function, *inputs):
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return make_fx(function)(*map(mode.from_tensor, inputs))


@pytest.fixture
def compile_piece(monkeypatch):
    """``compile_piece(settings, graph)``: compile a graph as vllm-ascend does without npugraph_ex; what its passes saw."""
    monkeypatch.setattr(vllm, "_taken", {"mlp.experts": ""})
    monkeypatch.setattr(vllm, "_deployment", Deployment(soc="A3", max_tokens=256, guards="forbid"))
    monkeypatch.setattr(vllm, "_reports", [])

    def run(settings, graph, skip=False):
        monkeypatch.setattr(vllm, "_engine", SimpleNamespace(additional_config={"moe_lowering": settings}))
        seen = []

        def passes(graph):
            seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
            return graph

        def fusion_pass_compile(graph, inputs, options, compile_range, key=None):
            return graph if skip else options["passes"](graph), key

        module = SimpleNamespace(COMPILATION_PASS_KEY="passes", fusion_pass_compile=fusion_pass_compile)
        vllm._watch_passes(module)
        options = {"passes": passes}
        assert module.fusion_pass_compile(graph, [], options, RANGE, "key") == (graph, "key")
        assert options == {"passes": passes}  # vLLM's own, which it uses for other pieces
        return seen

    return run


def test_the_pass_runs_before_vllm_ascends_own_passes(compile_piece, caplog):
    """With a cudagraph_mode of pieces: each is a graph, and one without a layer has no report."""
    caplog.set_level("INFO", "vllm.moe_lowering")
    layer = MoE(64, 32, 8, 2)
    seen = compile_piece({}, trace(layer, torch.ones(4, 64)))
    assert "npu.npu_moe_init_routing_v2.default" in seen and not any("moe_lowering" in name for name in seen)
    assert [block.comm for report in vllm.reports() for block in report.blocks] == ["allgather"]
    assert "graph for 1 to 256 tokens" in caplog.text
    assert compile_piece({}, trace(lambda x: x + 1, torch.ones(4, 64))) == ["aten.add.Tensor"]
    assert len(vllm.reports()) == 1
    seen = compile_piece({"enable": False}, trace(layer, torch.ones(4, 64)))
    assert "moe_lowering.dispatch.default" in seen and len(vllm.reports()) == 1


def test_a_trace_is_found_again_by_what_was_taken_over(monkeypatch):
    """vLLM's own key has the configuration, and not what the plugin made of it on this machine."""
    module = SimpleNamespace(aot_compile_hash_factors=lambda config: ["vllm"])
    for _ in range(2):
        vllm._watch_traces(module)

    def key(taken, deployment, settings=None):
        monkeypatch.setattr(vllm, "_taken", taken)
        monkeypatch.setattr(vllm, "_deployment", deployment)
        config = SimpleNamespace(additional_config={"moe_lowering": settings or {}})
        return tuple(module.aot_compile_hash_factors(config))

    one = Deployment(soc="A3", max_tokens=256, guards="forbid")
    stays = {"0": "[vllm.not_lowered] ...", "1": "[vllm.not_lowered] ..."}
    keys = [
        key({"0": "", "1": ""}, one),
        key({"0": "", "1": stays["1"]}, one),
        key({"0": "", "1": ""}, one.replace(soc="A2")),
        key({"0": "", "1": ""}, one, {"policy": "auto"}),
        key(stays, one),
    ]
    assert len(set(keys)) == len(keys) and keys[-1] == ("vllm",) and keys[0] == key({"1": "", "0": ""}, one)
    assert keys[0][0] == "vllm" and keys[0][2:] == ("0", "1")  # once, though it was asked for twice


def test_passes_that_are_not_run_are_told(compile_piece):
    with pytest.raises(ValueError, match=r"strict.*\[vllm.pass_not_run\]"):
        compile_piece({"strict": True}, trace(lambda x: x + 1, torch.ones(4)), skip=True)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"version": "0.24.0"}, "version"),
        ({"lora_config": SimpleNamespace(max_loras=1)}, "lora"),
        ({"speculative_config": SimpleNamespace(method="mtp")}, "speculative"),
        ({"enforce_eager": True}, "eager"),
        ({"mode": "NONE"}, "eager"),
        ({"data_parallel_size": 2, "use_v2_model_runner": True}, "data_parallel"),
    ],
)
def test_an_engine_whose_graphs_do_not_come_by(monkeypatch, changes, code):
    def check(version="0.23.0+local", enforce_eager=False, mode="VLLM_COMPILE", data_parallel_size=1, **given):
        monkeypatch.setattr(vllm_engine.importlib.metadata, "version", lambda name: version)
        model = SimpleNamespace(enforce_eager=enforce_eager)
        named = {name: SimpleNamespace(name=value) for name, value in (("mode", mode), ("cudagraph_mode", "FULL"))}
        usual = {"lora_config": None, "speculative_config": None, "compilation_config": SimpleNamespace(**named)}
        usual["parallel_config"] = SimpleNamespace(data_parallel_size=data_parallel_size)
        vllm_engine.check_engine(SimpleNamespace(**{**usual, "model_config": model, **given}))

    check()
    with pytest.raises(Refused, match=rf"^\[vllm\.{code}\] .* is .*; accepted: "):
        check(**changes)
