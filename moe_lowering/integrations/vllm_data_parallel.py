"""Data parallel engines with expert parallelism over them: what must hold so that their MoE layers can be lowered.

A lowered graph asks that all ranks of the EP group have the same number of tokens in each forward, and so that all of them
run the graph of the same compile range. vllm-ascend 0.23.0 pads to the largest number over the DP ranks only where the graph
is captured (``NPUModelRunner._determine_batch_execution_and_padding``, ``allow_dp_padding``); in other forwards its operator
gathers or exchanges unequal numbers behind the compiler's back. ``pad_tokens`` makes it pad in all of them, as it does by
itself with sequence parallelism. A rank without a request takes part with a dummy batch, which is padded in the same way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from moe_lowering.integrations.vllm_refusals import refuse

RUNNER = "vllm_ascend.worker.model_runner_v1"


def check_data_parallel(config: Any) -> None:
    """Refuse data parallel engines whose token counts cannot be made equal; nothing where there is one engine.

    Raises:
        Refused: see above.
    """
    if config.parallel_config.data_parallel_size == 1:
        return
    if config.use_v2_model_runner:  # it agrees on tokens by another way
        raise refuse(
            "data_parallel", "the model runner of data parallel engines", "V2", "V1: VLLM_USE_V2_MODEL_RUNNER unset"
        )
    transfer = config.kv_transfer_config
    # should_skip_allreduce_across_dp_group: no rank knows others' T
    if transfer is not None and transfer.is_kv_consumer:
        accepted = "kv_producer, or no kv_transfer_config"
        raise refuse("data_parallel", "kv_role of data parallel engines", transfer.kv_role, accepted)


def pad_tokens(module: Any, is_on: Callable[[], bool]) -> None:
    """Let the runner of ``model_runner_v1`` pad every forward to the largest token count of the DP ranks, where ``is_on()``.

    Draft models ask by position and are padded already.
    """
    runner = module.NPUModelRunner
    exchange = runner._sync_metadata_across_dp

    @functools.wraps(exchange)
    def sync_metadata_across_dp(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_on():
            kwargs["allow_dp_padding"] = True
        return exchange(self, *args, **kwargs)

    runner._sync_metadata_across_dp = sync_metadata_across_dp
