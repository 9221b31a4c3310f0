"""Serving: a decode loop over buckets of batch sizes, each one compiled and captured once.

It is a reference loop of one rank, to read and to test graphs with. Who serves on Ascend serves with vLLM and vllm-ascend; the
pass inside of them is ``integrations.vllm`` (docs/vllm.md).

    from moe_lowering import Deployment
    from moe_lowering.serving import Request, Server

    server = Server(model, Deployment(max_tokens=1024), buckets=(1, 2, 4, 8), max_length=1024)
    server.warm_up(progress=print)
    results = server.generate([Request([1, 5, 7], max_new_tokens=20)])

See docs/serving.md.
"""

from __future__ import annotations

from moe_lowering.serving.graphs import RecompileError
from moe_lowering.serving.requests import Request, Result
from moe_lowering.serving.server import Server
from moe_lowering.serving.statistics import Statistics

__all__ = ["RecompileError", "Request", "Result", "Server", "Statistics"]
