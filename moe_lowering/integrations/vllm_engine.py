"""Whether an engine's graphs come by the plugin at all and its ranks can agree on tokens, from vLLM's configuration."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from moe_lowering.integrations.vllm_data_parallel import check_data_parallel
from moe_lowering.integrations.vllm_refusals import refuse

TESTED = ("0.23.0",)  # versions of vllm-ascend
COMPILED = "VLLM_COMPILE"  # vLLM's mode in which vllm-ascend's compiler is called


def check_engine(config: Any) -> None:
    """Refuse an engine whose graphs do not come by, or whose ranks do not agree on their tokens.

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
    check_data_parallel(config)
