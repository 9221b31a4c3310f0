"""What goes wrong on one rank, for tests: vLLM imports ``Extension`` in each worker (``worker_extension_cls``).

The environment variable ``VLLM_TESTS_FAULT`` says what: ``deployment`` (rank 1 has another HCCL buffer) or ``kill`` (rank 1 is
killed when it begins to decode).
"""

import os
import signal

from moe_lowering import import_hooks

FAULTY = 1  # the rank


def _is_faulty():
    import torch.distributed as dist

    return dist.is_initialized() and dist.get_rank() == FAULTY


def other_deployment(module):
    original = module.deployment_of

    def deployment_of(vllm_config):
        deployment = original(vllm_config)
        return deployment.replace(hccl_buffer_mb=100) if _is_faulty() else deployment

    module.deployment_of = deployment_of


def kill_in_decode(module):
    runner = module.NPUModelRunner
    original = runner.execute_model

    def execute_model(self, scheduler_output, *args, **kwargs):
        tokens = scheduler_output.num_scheduled_tokens.values()
        if _is_faulty() and tokens and set(tokens) == {1}:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, scheduler_output, *args, **kwargs)

    runner.execute_model = execute_model


FAULTS = {
    "deployment": ("moe_lowering.integrations.vllm", other_deployment),
    "kill": ("vllm_ascend.worker.model_runner_v1", kill_in_decode),
}


class Extension:
    """Nothing: to import it is what counts."""


if "VLLM_TESTS_FAULT" in os.environ:
    import_hooks.after(*FAULTS[os.environ["VLLM_TESTS_FAULT"]])
