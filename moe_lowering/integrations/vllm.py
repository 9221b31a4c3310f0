"""vLLM on Ascend (vllm-ascend): its MoE layers, lowered by this package inside of its compiled graph.

A plugin of vLLM (entry point ``vllm.general_plugins``), which vLLM loads in each of its processes. Where the package is
installed it is there. Until it is switched on it does no more than tell other ranks so:

    LLM(model, additional_config={"moe_lowering": {}})

docs/vllm.md has the settings.

Before: a compiled graph has one opaque operator for each MoE layer, ``torch.ops.vllm.moe_forward``, which picks its communication
on the host in each forward. After: it has the operators of the implementation that the pass chose for the graph's range of
tokens. Kept: routing, shared experts, the reduction that vLLM expects of the layer, vllm-ascend's other passes, the user's own.
Not taken over: what ``vllm_layers.read_layer`` refuses, and whatever runs outside of a compile; there vllm-ascend's operator
stays, and the log says why.

vllm-ascend is changed when its modules are imported (``import_hooks``): a method that says when a layer's weights are loaded,
its two ways to compile (npugraph_ex's options, and the passes that it runs where it switches that off: for a
``cudagraph_mode`` with PIECEWISE), and the key of its compile cache.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

from moe_lowering import import_hooks
from moe_lowering.backends.cache_key import cache_digest
from moe_lowering.backends.npugraph_ex import PRE_PASS, npugraph_ex_options
from moe_lowering.deployment import Deployment
from moe_lowering.integrations.vllm_agreement import after_load, compare_layers, ep_group_name
from moe_lowering.integrations.vllm_data_parallel import RUNNER, pad_tokens
from moe_lowering.integrations.vllm_deployment import deployment_for_range, deployment_for_weights, deployment_of
from moe_lowering.integrations.vllm_engine import check_engine
from moe_lowering.integrations.vllm_hooks import add_to_graph_key, add_to_trace_key, after_weights, is_watched, on_load
from moe_lowering.integrations.vllm_layers import read_layer, take_over
from moe_lowering.integrations.vllm_legality import require_lowered, token_ranges_of, unsplit_range
from moe_lowering.integrations.vllm_ranges import ranges_of_vllm
from moe_lowering.integrations.vllm_refusals import Refused, refuse
from moe_lowering.integrations.vllm_settings import KEY, SETTINGS, settings_of
from moe_lowering.passes.pipeline import MoeLowering
from moe_lowering.passes.policy import Policy
from moe_lowering.passes.verifier import generic_nodes
from moe_lowering.report.records import LoweringReport
from moe_lowering.report.text import render

__all__ = ["KEY", "SETTINGS", "register", "reports"]

LAYERS, COMPILER = "vllm_ascend.ops.fused_moe.fused_moe", "vllm_ascend.compilation.compiler_interface"
CACHE = "vllm.compilation.caching"
QUANTISED_LAYERS = "vllm_ascend.quantization.method_adapters"

log = logging.getLogger("vllm.moe_lowering")  # vLLM shows loggers of its own
_reports: list[LoweringReport] = []
_taken: dict[str, str] = {}  # layer -> "" where it is taken over, else why not
_compile_range: list[Any] = []  # of the compile under way
_unlowered: list[dict[str, Any]] = []  # settings of the compile under way, until its graph went through the pass
_deployment: Deployment | None = None
_engine: Any = None  # the configuration of the engine that the two above are of


def register() -> None:
    """Let vllm-ascend's layers be taken over where ``additional_config`` asks for it. Calling it again changes nothing."""
    import_hooks.after(LAYERS, _watch_layers)
    import_hooks.after(QUANTISED_LAYERS, _watch_quantised_layers)
    import_hooks.after(COMPILER, _watch_compiler)
    import_hooks.after(CACHE, _watch_traces)
    import_hooks.after(RUNNER, _watch_runner)


def reports() -> list[LoweringReport]:
    """The report of each graph that was compiled in this process, oldest first."""
    return list(_reports)


def layers() -> dict[str, str]:
    """Each MoE layer of this process: "" where it is taken over, else why it is not."""
    return dict(_taken)


def _watch_layers(module: Any) -> None:
    """When an unquantised layer has its weights, decide whether it is taken over."""
    after_weights(module.AscendUnquantizedFusedMoEMethod, _decide)


def _watch_quantised_layers(module: Any) -> None:
    """The same for quantised ones, of all schemes."""
    after_weights(module.AscendFusedMoEMethod, _decide)


def _watch_runner(module: Any) -> None:
    """Let ranks compare what they took over, and data parallel engines pad alike where that is a layer."""
    if not is_watched(module):
        after_load(module, _compare_layers)
        pad_tokens(module, lambda: "" in _taken.values())


def _compare_layers() -> None:
    is_on = _engine is not None and settings_of(_engine) is not None
    compare_layers(ep_group_name(), _taken, is_on)


def _decide(layer: Any) -> None:
    global _deployment
    config = layer.vllm_config
    settings = settings_of(config)
    _begin(config)
    if settings is None or layer.layer_name in _taken:
        return
    try:
        check_engine(config)
        deployment = _deployment_for(layer)
        form = read_layer(layer, deployment)
        policy = Policy(settings["comm"], settings["policy"])
        ranges = token_ranges_of(config, deployment)
        require_lowered(layer, form, policy, deployment, ranges)
        take_over(layer, form)
    except Refused as reason:
        if settings["strict"]:
            raise ValueError(f"moe_lowering (strict): {layer.layer_name}: {reason}") from reason
        _taken[layer.layer_name] = str(reason)
        log.warning("moe_lowering: %s stays with vllm-ascend's operator: %s", layer.layer_name, reason)
        return
    if "" not in _taken.values() and (hint := unsplit_range(policy, deployment, ranges)):
        log.info("moe_lowering: %s", hint)
    _taken[layer.layer_name] = ""
    _deployment = deployment
    opaque = config.compilation_config.static_all_moe_layers  # vLLM numbers its operator's calls by this list
    if layer.layer_name in opaque:
        opaque.remove(layer.layer_name)
    log.info("moe_lowering: %s is taken over", layer.layer_name)


def _begin(config: Any) -> None:
    """Forget what was decided for another engine of this process, whose layers have the same names."""
    global _deployment, _engine
    if config is not _engine:
        _taken.clear()
        _deployment, _engine = None, config


def _deployment_of(config: Any) -> Deployment:
    global _deployment
    if _deployment is None:
        try:
            _deployment = deployment_of(config)
        except ValueError as error:  # groups or sizes that the pass does not know
            raise Refused(f"[vllm.deployment] {error}") from error
    return _deployment


def _deployment_for(layer: Any) -> Deployment:
    """The deployment for the layers taken over so far and this one: a graph has one memory format of experts."""
    others = _deployment_of(layer.vllm_config)
    deployment = deployment_for_weights(others, layer)
    if "" in _taken.values() and deployment.weight_format != others.weight_format:
        accepted = f"{others.weight_format}, as of the layers that are taken over already"
        raise refuse("weight_format", "the memory format of the experts", deployment.weight_format, accepted)
    return deployment


def _watch_compiler(module: Any) -> None:
    """Let the pass run in vllm-ascend's compiles, and put what it depends on into the key of the compile cache."""
    if is_watched(module):
        return
    _watch_npugraph_ex(module)
    _watch_passes(module)
    add_to_graph_key(module.AscendCompiler, lambda config: _cache_factors(config)[:1])
    on_load(module.AscendCompiler, _log_load)


def _log_load(handle: Any) -> None:
    if "" in _taken.values():
        text = "moe_lowering: a lowered graph comes from vLLM's compile cache, %s: its report was in the log then"
        log.info(text, handle)


def _watch_npugraph_ex(module: Any) -> None:
    """Put the pass into the options of npugraph_ex."""
    configure, compile_graph = module._configure_backend, module.npugraph_ex_compile

    @functools.wraps(configure)
    def configure_backend(
        config: Any, ascend_config: Any, vllm_config: Any, process_kwargs_options: Callable[..., Any] | None = None
    ) -> None:
        configure(config, ascend_config, vllm_config, process_kwargs_options)
        if process_kwargs_options is not None and (hook := _hook(vllm_config, _user_pass(config))):
            process_kwargs_options(config, {"options": {PRE_PASS: hook}})

    @functools.wraps(compile_graph)
    def npugraph_ex_compile(
        graph: Any, inputs: Any, options: Any, vllm_config: Any, ascend_config: Any, compile_range: Any, *more: Any
    ) -> Any:
        with _compile_of(vllm_config, compile_range):
            return compile_graph(graph, inputs, options, vllm_config, ascend_config, compile_range, *more)

    module._configure_backend, module.npugraph_ex_compile = configure_backend, npugraph_ex_compile


def _watch_passes(module: Any) -> None:
    """Where vllm-ascend switches npugraph_ex off, it runs passes of its own over each piece of the model: be the first."""
    compile_piece = module.fusion_pass_compile

    @functools.wraps(compile_piece)
    def fusion_pass_compile(graph: Any, inputs: Any, options: Any, compile_range: Any, *more: Any) -> Any:
        with _compile_of(_engine, compile_range):
            if (hook := _hook(_engine, None)) is not None:
                key = module.COMPILATION_PASS_KEY
                options = {**options, key: _one_after_the_other(hook, options[key])}
            return compile_piece(graph, inputs, options, compile_range, *more)

    module.fusion_pass_compile = fusion_pass_compile


def _one_after_the_other(hook: Any, passes: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def run(graph: Any) -> Any:
        hook(graph, None, None)
        return passes(graph)

    return run


def _watch_traces(module: Any) -> None:
    """vLLM keeps the traced model too (torch_aot_compile), with the operators that layers traced to: it is found again by what
    was taken over, else a new engine that decides otherwise would run the old trace."""
    if not is_watched(module):
        add_to_trace_key(module, _cache_factors)


def _cache_factors(vllm_config: Any) -> list[str]:
    """What caches must hash: the digest of pass and deployment, and the layers that are taken over; nothing without one."""
    settings = _settings_where_taken(vllm_config)
    if settings is None:
        return []
    taken = sorted(name for name, why in _taken.items() if not why)
    return [cache_digest(_lowering(settings, _deployment_of(vllm_config)))[:16], *taken]


def _user_pass(config: Any) -> Any:
    """A pre-pass that somebody else put into npugraph_ex's configuration, None without one."""
    option = getattr(config, PRE_PASS, None)
    return getattr(option, "value", option)


@contextlib.contextmanager
def _compile_of(vllm_config: Any, compile_range: Any) -> Iterator[None]:
    """One compile: for which range it is, and afterwards whether the pass saw its graph.

    Raises:
        ValueError: strict is on, and it did not.
    """
    settings = _settings_where_taken(vllm_config)
    _compile_range.append(compile_range)
    _unlowered[:] = [settings] if settings else []
    try:
        yield
    finally:
        _compile_range.pop()
    _require_run()


def _settings_where_taken(vllm_config: Any) -> dict[str, Any] | None:
    """The settings, where the plugin is on and took a layer over."""
    return settings_of(vllm_config) if "" in _taken.values() else None


def _hook(vllm_config: Any, own: Any) -> Any:
    """The pre-pass for the graph that is about to be compiled; None where the plugin is off or took over no layer."""
    settings = _settings_where_taken(vllm_config)
    if settings is None:
        return None
    deployment = _deployment_of(vllm_config)
    if _compile_range:
        first, last = int(_compile_range[-1].start), int(_compile_range[-1].end)
        deployment = deployment_for_range(deployment, first, last)
    lowering = _lowering(settings, deployment)
    options = npugraph_ex_options(
        deployment, lowering=lowering, force_eager=True, **({} if own is None else {PRE_PASS: own})
    )
    run = options[PRE_PASS]

    def lower_and_report(gm: Any, example_inputs: Any, config: Any) -> None:
        _unlowered.clear()
        before = len(lowering.reports)
        with ranges_of_vllm(gm, deployment.min_tokens, deployment.max_tokens):
            run(gm, example_inputs, config)
            for report in lowering.reports[before:]:
                if report.blocks or generic_nodes(gm.graph.nodes):  # not a piece of the model without a layer
                    _log_report(report, deployment)

    return lower_and_report


def _log_report(report: LoweringReport, deployment: Deployment) -> None:
    _reports.append(report)
    text = "moe_lowering: graph for %d to %d tokens\n%s"
    log.info(text, deployment.min_tokens, deployment.max_tokens, render(report))
    for block in report.blocks:
        if block.comm is None:
            log.error("moe_lowering: %s", _cannot_run(block.name, block.reason))


def _require_run() -> None:
    """Say so where somebody replaced the pre-pass after the plugin had set it: the graph was not lowered.

    Raises:
        ValueError: strict is on.
    """
    if not _unlowered:
        return
    what = (
        f"[vllm.pass_not_run] {PRE_PASS} is another one than the plugin's, which was set before, so that the graph is not "
        "lowered and cannot run on a device; accepted: one that is there when _configure_backend returns, it then runs "
        "before the plugin's; or the plugin switched off"
    )
    if _unlowered.pop()["strict"]:
        raise ValueError(f"moe_lowering (strict): {what}")
    log.error("moe_lowering: %s", what)


def _cannot_run(name: str, reason: str) -> str:
    return (
        f"[vllm.not_lowered] {name} was taken over and is not lowered, so that the graph cannot run on a device: {reason}; "
        "accepted: another policy or comm, or the plugin switched off"
    )


def _lowering(settings: dict[str, Any], deployment: Deployment) -> MoeLowering:
    return MoeLowering(deployment, settings["comm"], settings["strict"], settings["policy"])
