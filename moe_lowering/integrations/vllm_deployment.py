"""The ``Deployment`` of a vLLM process on vllm-ascend, from vLLM's configuration and process groups.

``Deployment.detected`` names, for each field that comes from vLLM, the setting that it was read from.
"""

from __future__ import annotations

import importlib
from typing import Any

from moe_lowering.deployment import Deployment
from moe_lowering.deployment_detection import Detected
from moe_lowering.integrations.vllm_weights import scheme_of, weight_format_of
from moe_lowering.providers import soc_of_device_type

VLLM_ASCEND = "vllm_ascend"


def deployment_of(vllm_config: Any) -> Deployment:
    """The deployment of this process, whose groups vLLM has made.

    Raises:
        ValueError: as ``Deployment.from_groups``.
    """
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    config = importlib.import_module("vllm_ascend.ascend_config").get_ascend_config()
    expert_parallel = (
        parallel.enable_expert_parallel and parallel.tensor_parallel_size * parallel.data_parallel_size > 1
    )
    fields: dict[str, tuple[Any, str]] = {
        "max_tokens": (scheduler.max_num_batched_tokens, "scheduler_config.max_num_batched_tokens"),
        "guards": ("forbid", "vLLM keeps no guards of a compiled graph"),
        "capture": (vllm_config.compilation_config.cudagraph_mode.name != "NONE", "compilation_config.cudagraph_mode"),
        "fused_mode": (int(config.enable_fused_mc2), "additional_config.enable_fused_mc2"),
    }
    context = importlib.import_module("vllm_ascend.ascend_forward_context")
    fields["mc2_capacity"] = (int(context.get_mc2_tokens_capacity() or 0), "vllm-ascend's get_mc2_tokens_capacity()")
    groups: dict[str, Any] = {"ep": None}
    if expert_parallel:
        state = importlib.import_module("vllm.distributed.parallel_state")
        ascend_state = importlib.import_module("vllm_ascend.distributed.parallel_state")
        groups = {"ep": state.get_ep_group().device_group, "mc2": ascend_state.get_mc2_group().device_group}
        if parallel.tensor_parallel_size > 1:
            groups["tp"] = state.get_tp_group().device_group
    deployment = Deployment.from_groups(**groups, **{name: value for name, (value, _) in fields.items()})
    read = tuple(Detected(name, str(value), source) for name, (value, source) in fields.items())
    return with_loaded_build(deployment.replace(detected=(*deployment.detected, *read)))


def with_loaded_build(deployment: Deployment) -> Deployment:
    """The deployment with the build of vllm-ascend that this process has imported, which need not be the file's."""
    build = soc_of_device_type(importlib.import_module("vllm_ascend._build_info").__device_type__)
    installed = tuple(
        (name, version, build if name == VLLM_ASCEND else old) for name, version, old in deployment.installed or ()
    )
    if installed == deployment.installed:
        return deployment
    read = Detected("installed", f"{VLLM_ASCEND} built for {build}", "vllm_ascend._build_info, as imported")
    kept = tuple(each for each in deployment.detected if each.field != "installed")
    return deployment.replace(installed=installed, detected=(*kept, read))


def deployment_for_weights(deployment: Deployment, layer: Any) -> Deployment:
    """The deployment with the memory format of a layer's experts.

    Raises:
        Refused: see ``scheme_of``.
    """
    word, source = weight_format_of(layer, scheme_of(layer))
    if word == deployment.weight_format and any(each.field == "weight_format" for each in deployment.detected):
        return deployment
    kept = tuple(each for each in deployment.detected if each.field != "weight_format")
    return deployment.replace(weight_format=word, detected=(*kept, Detected("weight_format", word, source)))


def deployment_for_range(deployment: Deployment, first: int, last: int) -> Deployment:
    """The deployment for a graph that vLLM compiles for ``first`` to ``last`` tokens."""
    most = min(last, deployment.max_tokens)
    narrowed = deployment.replace(min_tokens=first, max_tokens=most)
    source = f"vLLM's compile range, {first} to {last}, and scheduler_config.max_num_batched_tokens"
    read = (Detected("min_tokens", str(first), source), Detected("max_tokens", str(most), source))
    return narrowed.replace(detected=(*narrowed.detected, *read))
