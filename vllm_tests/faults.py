"""What goes wrong on one rank, for tests: vLLM imports ``Extension`` in each worker (``worker_extension_cls``).

The environment variable ``VLLM_TESTS_FAULT`` says what: ``deployment`` (rank 1 has another HCCL buffer), ``left`` (rank 1 takes
no layer over) or ``kill`` (rank 1 is killed when it begins to decode). ``own_pass`` is none: somebody else's code gives
npugraph_ex a pre-pass, beside the plugin's or, with ``own_pass_instead``, instead of it.
"""

import importlib
import os
import signal
import sys

import workers

from moe_lowering import import_hooks
from moe_lowering.backends.npugraph_ex import PRE_PASS

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


def no_layer(module):
    original = module.read_layer

    def read_layer(layer, deployment):
        if _is_faulty():
            raise module.refuse("fault", "the rank", FAULTY, "another")
        return original(layer, deployment)

    module.read_layer = read_layer


def kill_in_decode(module):
    runner = module.NPUModelRunner
    original = runner.execute_model

    def execute_model(self, scheduler_output, *args, **kwargs):
        tokens = scheduler_output.num_scheduled_tokens.values()
        if _is_faulty() and tokens and set(tokens) == {1}:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, scheduler_output, *args, **kwargs)

    runner.execute_model = execute_model


def own_pass(module):
    """Each configuration has the pass from the start."""
    original = module.CompilerConfig.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        setattr(self, PRE_PASS, count_experts)

    module.CompilerConfig.__init__ = init


def own_pass_instead(module):
    """The options are replaced when all others have set theirs, as whoever calls npugraph_ex can."""
    original = module.get_npu_backend

    def get_npu_backend(*, compiler_config, **kwargs):
        setattr(compiler_config, PRE_PASS, count_experts)
        return original(compiler_config=compiler_config, **kwargs)

    module.get_npu_backend = get_npu_backend


def count_experts(gm, example_inputs, config):
    calls = [str(node.target) for node in gm.graph.nodes if str(node.target).startswith("moe_lowering.dispatch")]
    print(f"the user's own pass saw {len(calls)} moe_lowering.dispatch", file=sys.stderr, flush=True)


FAULTS = {
    "deployment": ("moe_lowering.integrations.vllm", other_deployment),
    "left": ("moe_lowering.integrations.vllm", no_layer),
    "own_pass": ("npugraph_ex", own_pass),
    "own_pass_instead": ("npugraph_ex", own_pass_instead),
    "kill": ("vllm_ascend.worker.model_runner_v1", kill_in_decode),
}


class Extension(workers.Extension):
    """To import it is what counts."""


if "VLLM_TESTS_FAULT" in os.environ:
    name, change = FAULTS[os.environ["VLLM_TESTS_FAULT"]]
    if name == "npugraph_ex":  # torch_npu puts it into sys.modules, and no hook on its import sees that
        importlib.import_module(name)
    import_hooks.after(name, change)
