"""vLLM on Ascend (vllm-ascend): its MoE layers, lowered by this package inside of its compiled graph.

A plugin of vLLM (entry point ``vllm.general_plugins``), which vLLM loads in each of its processes. Where the package is
installed it is there, and does nothing until it is switched on:

    LLM(model, additional_config={"moe_lowering": {}}, compilation_config={"cudagraph_mode": "FULL_DECODE_ONLY"})

docs/vllm.md has the settings.

Before: a compiled graph has one opaque operator for each MoE layer, ``torch.ops.vllm.moe_forward``, which picks its communication
on the host in each forward. After: it has the operators of the implementation that the pass chose for the graph's range of
tokens. Kept: routing, shared experts, the reduction that vLLM expects of the layer, vllm-ascend's other passes, the user's own.
Not taken over: what ``vllm_layers.read_layer`` refuses, and whatever runs outside of a compile; there vllm-ascend's operator
stays, and the log says why.

vllm-ascend is changed when its modules are imported (``import_hooks``): a method that says when a layer's weights are loaded,
the options of its compiler, and the key of its compile cache.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import logging
from collections.abc import Callable, Iterator
from typing import Any

from moe_lowering import import_hooks
from moe_lowering.argument_checks import require_choice, require_flag
from moe_lowering.backends.cache_key import cache_digest
from moe_lowering.backends.npugraph_ex import PRE_PASS, npugraph_ex_options
from moe_lowering.deployment import Deployment
from moe_lowering.integrations.vllm_deployment import deployment_for_range, deployment_for_weights, deployment_of
from moe_lowering.integrations.vllm_layers import read_layer, take_over
from moe_lowering.integrations.vllm_legality import require_lowered, token_ranges_of, unsplit_range
from moe_lowering.integrations.vllm_ranges import ranges_of_vllm
from moe_lowering.integrations.vllm_refusals import Refused, refuse
from moe_lowering.passes.pipeline import MoeLowering
from moe_lowering.passes.policy import Policy
from moe_lowering.report.records import LoweringReport
from moe_lowering.report.text import render
from moe_lowering.vocabulary import AUTO, COMMS, POLICIES

__all__ = ["KEY", "register", "reports"]

KEY = "moe_lowering"  # of additional_config
TESTED = ("0.23.0",)  # versions of vllm-ascend
LAYERS, COMPILER = "vllm_ascend.ops.fused_moe.fused_moe", "vllm_ascend.compilation.compiler_interface"
COMPILED = "VLLM_COMPILE"  # vLLM's mode in which vllm-ascend's compiler is called
QUANTISED_LAYERS = "vllm_ascend.quantization.method_adapters"
_WATCHED = "_moe_lowering_watches"
SETTINGS = {"enable": True, "policy": "vllm_ascend_main", "comm": "auto", "strict": False}

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


def reports() -> list[LoweringReport]:
    """The report of each graph that was compiled in this process, oldest first."""
    return list(_reports)


def layers() -> dict[str, str]:
    """Each MoE layer of this process: "" where it is taken over, else why it is not."""
    return dict(_taken)


def settings_of(vllm_config: Any) -> dict[str, Any] | None:
    """The settings of the plugin; None where it is not switched on.

    Raises:
        ValueError: an unknown setting, or a value that is not accepted.
    """
    asked = (vllm_config.additional_config or {}).get(KEY)
    if asked is None:
        return None
    what = f"additional_config[{KEY!r}]"
    if not isinstance(asked, dict) or asked.keys() - SETTINGS.keys():
        raise ValueError(f"{what} is {asked!r}; accepted: a dictionary with some of {', '.join(SETTINGS)}")
    settings = {**SETTINGS, **asked}
    require_flag(what, "enable", settings["enable"])
    require_flag(what, "strict", settings["strict"])
    require_choice(what, "comm", settings["comm"], COMMS)
    if settings["comm"] != AUTO and "policy" not in asked:
        settings["policy"] = AUTO  # one of vllm-ascend's rules would choose by itself
    require_choice(what, "policy", settings["policy"], POLICIES)
    try:
        Policy(settings["comm"], settings["policy"])
    except ValueError as error:  # words that do not go together
        raise ValueError(f"{what}: {error}") from error
    return settings if settings["enable"] else None


def _current_config() -> Any:
    return importlib.import_module("vllm.config").get_current_vllm_config()


def _watch_layers(module: Any) -> None:
    """When an unquantised layer has its weights, decide whether it is taken over."""
    _watch_method(module.AscendUnquantizedFusedMoEMethod)


def _watch_quantised_layers(module: Any) -> None:
    """The same for quantised ones, of all schemes."""
    _watch_method(module.AscendFusedMoEMethod)


def _watch_method(method: Any) -> None:
    original = method.process_weights_after_loading
    if _is_watched(method):
        return

    @functools.wraps(original)
    def process_weights_after_loading(self: Any, layer: Any) -> None:
        original(self, layer)
        _decide(layer)

    method.process_weights_after_loading = process_weights_after_loading


def _is_watched(owner: Any) -> bool:
    """Whether this was asked of a class or a module before. (That a function of it is wrapped does not say by whom.)"""
    known = vars(owner).get(_WATCHED, False)
    setattr(owner, _WATCHED, True)
    return bool(known)


def _decide(layer: Any) -> None:
    global _deployment
    config = layer.vllm_config
    settings = settings_of(config)
    _begin(config)
    if settings is None or layer.layer_name in _taken:
        return
    try:
        _check_engine(config)
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


def _check_engine(config: Any) -> None:
    """Refuse an engine whose graphs do not come by.

    Raises:
        Refused: see above.
    """
    version = importlib.metadata.version("vllm_ascend")
    if version.partition("+")[0] not in TESTED:
        raise refuse("version", "vllm-ascend", version, ", ".join(TESTED))
    if config.lora_config is not None:
        raise refuse("lora", "lora_config", "given", "none")
    if config.speculative_config is not None:
        raise refuse("speculative", "speculative_config", "given", "none")
    if config.model_config.enforce_eager:
        raise refuse("eager", "enforce_eager", "True", "False: nothing is compiled, and there is no graph to lower in")
    compilation = config.compilation_config
    chosen = f"cudagraph_mode is {compilation.cudagraph_mode.name}"
    if compilation.mode.name != COMPILED:
        accepted = f"{COMPILED}: nothing is compiled, and there is no graph to lower in"
        raise refuse("eager", "compilation_config.mode", f"{compilation.mode.name} ({chosen})", accepted)
    ascend = importlib.import_module("vllm_ascend.ascend_config").get_ascend_config()
    if not ascend.ascend_compilation_config.enable_npugraph_ex:
        accepted = "True; vllm-ascend switches it off unless compilation_config={'cudagraph_mode': 'FULL_DECODE_ONLY'} is given"
        raise refuse("compiler", "ascend_compilation_config.enable_npugraph_ex", f"False ({chosen})", accepted)


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
    """Put the pass into the options of npugraph_ex, and what it depends on into the key of the compile cache."""
    compiler = module.AscendCompiler
    configure, compile_graph = module._configure_backend, module.npugraph_ex_compile
    compute_hash, load_graph = compiler.compute_hash, compiler.load
    if _is_watched(module):
        return

    @functools.wraps(configure)
    def configure_backend(
        config: Any, ascend_config: Any, vllm_config: Any, process_kwargs_options: Callable[..., Any] | None = None
    ) -> None:
        configure(config, ascend_config, vllm_config, process_kwargs_options)
        if process_kwargs_options is not None and (hook := _hook(vllm_config, _user_pass(config))):
            process_kwargs_options(config, {"options": {PRE_PASS: hook}})

    @functools.wraps(compile_graph)
    def npugraph_ex_compile(*args: Any, **kwargs: Any) -> Any:
        with _range_of(args[5] if len(args) > 5 else kwargs["compile_range"]):
            _unlowered.clear()
            compiled = compile_graph(*args, **kwargs)
        _require_run()
        return compiled

    @functools.wraps(compute_hash)
    def hash_with_pass(self: Any, vllm_config: Any) -> str:
        settings = settings_of(vllm_config)
        found = str(compute_hash(self, vllm_config))
        if settings is None or "" not in _taken.values():
            return found
        return f"{found}-{cache_digest(_lowering(settings, _deployment_of(vllm_config)))[:16]}"

    @functools.wraps(load_graph)
    def load(self: Any, handle: Any, *args: Any, **kwargs: Any) -> Any:
        if "" in _taken.values():
            log.info(
                "moe_lowering: a lowered graph comes from vLLM's compile cache, %s: its report was in the log then",
                handle,
            )
        return load_graph(self, handle, *args, **kwargs)

    module._configure_backend, module.npugraph_ex_compile = configure_backend, npugraph_ex_compile
    compiler.compute_hash, compiler.load = hash_with_pass, load


def _user_pass(config: Any) -> Any:
    """A pre-pass that somebody else put into npugraph_ex's configuration, None without one."""
    option = getattr(config, PRE_PASS, None)
    return getattr(option, "value", option)


@contextlib.contextmanager
def _range_of(compile_range: Any) -> Iterator[None]:
    _compile_range.append(compile_range)
    try:
        yield
    finally:
        _compile_range.pop()


def _hook(vllm_config: Any, own: Any) -> Any:
    """The pre-pass for the graph that is about to be compiled; None where the plugin is off or took over no layer."""
    settings = settings_of(vllm_config)
    if settings is None or "" not in _taken.values():
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
    _unlowered.append(settings)

    def lower_and_report(gm: Any, example_inputs: Any, config: Any) -> None:
        _unlowered.clear()
        before = len(lowering.reports)
        with ranges_of_vllm(gm, deployment.min_tokens, deployment.max_tokens):
            run(gm, example_inputs, config)
            for report in lowering.reports[before:]:
                _reports.append(report)
                text = "moe_lowering: graph for %d to %d tokens\n%s"
                log.info(text, deployment.min_tokens, deployment.max_tokens, render(report))
                for block in report.blocks:
                    if block.comm is None:
                        log.error("moe_lowering: %s", _cannot_run(block.name, block.reason))

    return lower_and_report


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
