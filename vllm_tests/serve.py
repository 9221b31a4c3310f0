"""Serves a small model with the real engine, and prints one JSON object: tokens, what the compiled graphs call, and what each
rank says of itself (``ranks``, see ``workers``), the first one's answer at the top too.

moe-lowering simulate -- python serve.py '{"model": "/folder", "plugin": {}, "graphs": true, ...}'   # see Settings
"""

import dataclasses
import json
import os
import random
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

# What vllm-ascend fuses with kernels that it writes in Triton, or whose patterns run operators that have no kernel here.
FUSIONS = dict.fromkeys(("fuse_norm_quant", "fuse_qknorm_rope", "fuse_allreduce_rms", "fuse_muls_add"), False)
CALL = re.compile(r"torch\.ops\.(\w+)\.(\w+)")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to serve.

    Attributes:
        model: the folder of a checkpoint.
        cache: vLLM's cache, a folder of this run's own.
        plugin: settings of the plugin, None for off.
        graphs: compile, and capture decode; else eager.
        requests: how many, of random lengths; all at once.
        tokens: how many each is continued with.
        dtype: of the model.
        logprobs: how many of the best tokens' log probabilities to keep, of the first token of each request.
        ranks: of one tensor-parallel group.
        replicas: data parallel engines, each with every so many requests.
        shares: how many requests each of them has instead, in order.
        expert_parallel: over all ranks, where there is more than one.
        options: further arguments of ``LLM``.
        additional: further ``additional_config``.
    """

    model: str
    cache: str
    plugin: dict[str, Any] | None = None
    graphs: bool = False
    requests: int = 8
    tokens: int = 6
    dtype: str = "float32"
    logprobs: int = 0
    ranks: int = 1
    replicas: int = 1
    shares: list[int] = dataclasses.field(default_factory=list)
    expert_parallel: bool = True
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    additional: dict[str, Any] = dataclasses.field(default_factory=dict)


def prompts(settings: Settings) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(2, 500) for _ in range(draw.randrange(1, 40))] for _ in range(settings.requests)]


def share_of(settings: Settings, replica: int) -> list[int]:
    """The requests of one engine, by number."""
    before = sum(settings.shares[:replica])
    if settings.shares:
        return list(range(before, before + settings.shares[replica]))
    return list(range(replica, settings.requests, settings.replicas))


def options_of(settings: Settings) -> dict[str, Any]:
    """Arguments of ``LLM``."""
    additional: dict[str, Any] = {"ascend_compilation_config": FUSIONS, **settings.additional}
    if settings.plugin is not None:
        additional["moe_lowering"] = settings.plugin
    options: dict[str, Any] = {
        "additional_config": additional,
        "dtype": settings.dtype,
        "skip_tokenizer_init": True,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "gpu_memory_utilization": 0.5,
        "num_gpu_blocks_override": 64,
        "enable_prefix_caching": False,
        "worker_extension_cls": "workers.Extension",
    }
    if settings.ranks * settings.replicas > 1:
        options |= {"tensor_parallel_size": settings.ranks, "enable_expert_parallel": settings.expert_parallel}
    compilation = settings.options.get("compilation_config", {})
    if settings.graphs:
        graphs = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}
        return {**options, **settings.options, "compilation_config": {**graphs, **compilation}}
    return {**options, "enforce_eager": True, **settings.options}


def serve(settings: Settings, replica: int = 0) -> dict[str, Any]:
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_CACHE_ROOT=settings.cache)
    if settings.ranks * settings.replicas == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    llm = LLM(model=settings.model, **options_of(settings))
    sampling = SamplingParams(
        max_tokens=settings.tokens,
        temperature=0.0,
        detokenize=False,
        ignore_eos=True,
        logprobs=settings.logprobs or None,
    )
    asked = [prompts(settings)[request] for request in share_of(settings, replica)]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in asked], sampling)
    result: dict[str, Any] = {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}
    if settings.logprobs:
        first = [output.outputs[0].logprobs[0] for output in outputs]
        result["logprobs"] = [{token: entry.logprob for token, entry in found.items()} for found in first]
    files = [path for path in Path(settings.cache).rglob("artifact_compile_range*") if path.is_file()]
    result["compiled"] = [sorted({".".join(call) for call in CALL.findall(path.read_text())}) for path in files]
    result["ranks"] = llm.collective_rpc("observe")
    return result | result["ranks"][0]


def serve_replicas(settings: Settings) -> dict[str, Any]:
    """Data parallel engines, each a process that is told its place as vLLM's own example does it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(settings.replicas):
        place = {"VLLM_DP_RANK": rank, "VLLM_DP_RANK_LOCAL": rank, "VLLM_DP_SIZE": settings.replicas}
        place["VLLM_DP_MASTER_PORT"] = port
        own = dataclasses.replace(settings, cache=f"{settings.cache}/{rank}")
        command = [sys.executable, __file__, json.dumps(dataclasses.asdict(own)), str(rank)]
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        processes.append(subprocess.Popen(command, env=environment, text=True, **pipes))
    answers = [process.stdout.readline() for process in processes]  # "" of one that ended
    for process in processes:
        process.communicate()  # an engine that has no request left takes part until the last one has answered
    if failed := [str(rank) for rank, process in enumerate(processes) if process.returncode]:
        sys.exit(f"replicas with an error: {', '.join(failed)}")
    results = [json.loads(answer) for answer in answers]
    order = [request for rank in range(settings.replicas) for request in share_of(settings, rank)]
    found: dict[str, Any] = {}
    for name in ("tokens", "logprobs") if settings.logprobs else ("tokens",):
        answered = dict(zip(order, (each for result in results for each in result[name]), strict=True))
        found[name] = [answered[request] for request in range(settings.requests)]
    return found | {name: [each for result in results for each in result[name]] for name in ("compiled", "ranks")}


if __name__ == "__main__":
    out = os.dup(1)
    os.dup2(2, 1)  # vLLM prints on stdout
    asked, *place = sys.argv[1:]
    settings = Settings(**json.loads(asked))
    found = serve(settings, *map(int, place)) if place or settings.replicas == 1 else serve_replicas(settings)
    with os.fdopen(out, "w") as stream:
        print(json.dumps(found), file=stream, flush=True)
        if place:
            sys.stdin.read()  # until all engines have answered: the others' collectives wait for this one
