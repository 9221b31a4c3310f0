"""A plain torch.compile backend for CPU: AOTAutograd, the pass, and the graph run as it is.

For tests, for debugging on a laptop, and for looking at lowered graphs under fake tensors. Inference only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule

from moe_lowering import _versions
from moe_lowering.argument_checks import require_callable

Compiler = Callable[[GraphModule, Any], Any]


def lowering_backend(*passes: Callable[..., None]) -> Compiler:
    """A ``torch.compile`` backend for the CPU that runs ``passes`` on the AOT graph, and then the graph as it is.

    It needs no torch_npu. A graph that was lowered has Ascend operators, which run where they have CPU kernels: with the
    simulator enabled.

    Args:
        passes: each is called as ``(gm, example_inputs, config)`` with config None and edits ``gm`` in place, as a
            ``MoeLowering`` does. Use one backend for all compiles that are to share graphs.

    Returns:
        What ``torch.compile(backend=...)`` takes. Inference only.

    Raises:
        ValueError: a pass that cannot be called.
    """
    for number, graph_pass in enumerate(passes):
        require_callable("lowering_backend", f"passes[{number}]", graph_pass, "a callable (gm, example_inputs, config)")

    # importing dynamo takes seconds: only where something is compiled
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def compile_graph(gm: GraphModule, example_inputs: Any) -> Any:
        for graph_pass in passes:
            graph_pass(gm, example_inputs, None)
        return make_boxed_func(gm.forward)

    compile_with_aot = aot_autograd(fw_compiler=compile_graph)

    def compile_dynamo_graph(gm: GraphModule, example_inputs: Any) -> Any:
        return compile_with_aot(gm, _versions.refake_inputs(example_inputs))

    return compile_dynamo_graph
