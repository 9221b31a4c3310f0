"""Writes what the command line answers, and what graphs become, as text: one file a case, to compare two versions of the package.

    python .ci/corpus.py DIRECTORY [PREFIX]   # with the package to record first on PYTHONPATH; PREFIX: these cases only
    diff -r BEFORE AFTER

Times and addresses are left out. Nothing is judged here: a difference is for a person to read.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

COMMS = ("auto", "allgather", "alltoall", "mc2", "fused_mc2")
MODELS = ("qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral", "olmoe", "glm4_moe", "moe")
UNSTABLE = re.compile(
    r"\d+(\.\d+)? ?(s|ms|us)\b|(?<=peak memory) +[\d,.]+ MB|0x[0-9a-f]+|\"(\w+_seconds|peak_mib)\": [\d.e+-]+"
)


def cases() -> Iterator[tuple[str, str]]:
    """Name of the file, and the words of the command."""
    for model in MODELS[:-1]:
        for soc, ep, quant in itertools.product(("A2", "A3"), (1, 16, 64), ("none", "w8a8", "w4a8", "w4a16")):
            if quant != "none" and model not in MODELS[:2]:
                continue
            words = f"{model} --soc {soc} --ep {ep} --quant {quant} --tokens 128"
            yield f"explain {words}", f"explain {words}"
    for more in (
        "--json", "--unequal-tokens --max-tokens 512", "--tp 4", "--no-capture", "--hierarchy --soc A2", "--fused-mode 2",
        "--provider none", "--cann 8.3", "--buffer-mb 64 --tokens 2000", "--weight-format nd", "--dtype float32",
        "--policy vllm_ascend_main", "--policy vllm_ascend_0_13", "--why fused_mc2", "--why mc2", "--why alltoall",
        "--why allgather --json", "--sweep tokens=1..8192", "--sweep tokens=1..8192 --json", "--comm mc2 --tokens 600",
        "--soc A5", "--soc 310P", "--hidden 7000", "--experts 250", "--topk 20", "--soc A9", "--ep 0", "--quant w8a9",
    ):  # fmt: skip
        for model in ("deepseek_v3", "qwen3_moe"):
            yield f"explain {model} --ep 16 {more}", f"explain {model} --ep 16 {more}"
    for model, comm, more in itertools.product(MODELS, COMMS, ("", "--dynamic")):
        words = f"{model} --fake --layers 2 --ep 16 --tokens 64 --comm {comm} {more}"
        yield f"lower {words}", f"lower {words}"
    for more in ("--quant w8a8", "--quant w4a8", "--quant w4a16", "--tp 2", "--soc A2", "--dtype float16 --json"):
        for comm in COMMS[1:]:
            words = f"qwen3_moe --fake --layers 2 --ep 16 --tokens 64 --comm {comm} {more}"
            yield f"lower {words}", f"lower {words}"
    for words in ("", "--help", "lower --help", "explain --help", "matrix --help", "lower nothing", "explain", "lower"):
        yield f"usage {words}", words


def main() -> int:
    if not 2 <= len(sys.argv) <= 3:
        print(f"usage: {sys.argv[0]} DIRECTORY [PREFIX]", file=sys.stderr)
        return 2
    target, prefix = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) == 3 else ""
    target.mkdir(parents=True, exist_ok=True)
    graphs = record_graphs()
    for name, words in cases():
        if name.startswith(prefix):
            graphs.clear()
            text = answer(words) + "".join(f"\n--- graph {n}\n{code}" for n, code in enumerate(graphs, 1))
            path = target / re.sub(r"[^\w.=-]+", "_", name).strip("_")
            path.write_text(UNSTABLE.sub("_", text))
    return 0


def record_graphs() -> list[str]:
    """The list into which the code of each graph goes that the pass has been called with, after the call."""
    from moe_lowering import MoeLowering

    graphs: list[str] = []
    call = MoeLowering.__call__

    def recorded(self, graph_module, *args, **kwargs):  # type: ignore[no-untyped-def]
        result = call(self, graph_module, *args, **kwargs)
        module = graph_module if hasattr(graph_module, "graph") else graph_module.owning_module
        graphs.append(str(getattr(module, "graph", module)))
        return result

    MoeLowering.__call__ = recorded  # type: ignore[method-assign]
    return graphs


def answer(words: str) -> str:
    """Output, errors and exit code of a command, run in this process."""
    import torch

    from moe_lowering import cli

    torch._dynamo.reset()
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            code = cli.main(words.split())
        except SystemExit as error:
            code = error.code
    return f"$ moe-lowering {words}\n{out.getvalue()}\n--- errors\n{errors.getvalue()}\n--- exit {code}\n"


if __name__ == "__main__":
    sys.exit(main())
