"""What the pass costs, on synthetic graphs (``graphs.py``): ``make bench``, or ``python benchmarks/bench_pass.py --help``.

Times are CPU time of the compiling thread, medians over runs; every run works on a fresh graph. "Per block" is the slope
between the smallest and the largest number of layers, so what the first of equal blocks costs is apart. "Pass" is
everything but ``graph.lint`` and ``recompile``, which are apart too. Block figures include the lowering of the block's
routing. Targets: docs of the project ("Speed").
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from typing import Any

from moe_lowering import simulator  # first: it lets torch be imported where torch_npu is installed without CANN

simulator.enable()

import torch  # noqa: E402
from graphs import DEPLOYMENT, Shape, build  # noqa: E402
from inductor import apply, handler_pass, new_operators, replacement_pass  # noqa: E402
from measurements import STAGES, Times, exponent, medians, run_pass, slope, timed  # noqa: E402

from moe_lowering import MoeLowering  # noqa: E402

COMMS = ("allgather", "alltoall", "mc2", "fused_mc2")
GROWTH = (8, 512)


def measure(shape: Shape, comm: str, runs: int) -> Times:
    """Medians of a run's stages, seconds."""
    samples = []
    for _ in range(runs):
        lowering = MoeLowering(DEPLOYMENT, comm)
        samples.append(run_pass(build(shape), lowering))
        done = [block.comm for block in lowering.reports[0].blocks]
        assert done == [comm] * (shape.layers if shape.blocks else 0), done
    return medians(samples)


def block_row(comm: str, symbolic: bool, layers: list[int], runs: int) -> dict[str, Any]:
    """Microseconds of one more equal block, by stage, and what the first one costs."""
    measure(Shape(2, symbolic=symbolic), comm, 1)  # imports and caches
    times = {n: measure(Shape(n, symbolic=symbolic), comm, runs) for n in sorted({1, *layers})}
    row: dict[str, Any] = {key: 1e6 * slope({n: t[key] for n, t in times.items()}) for key in (*STAGES, "pass")}
    return {"comm": comm, "sizes": "symbolic" if symbolic else "static", "first": 1e6 * times[1]["pass"], **row}


def growth_row(comm: str, symbolic: bool, runs: int) -> dict[str, Any]:
    """Growth of the pass between 8 and 512 layers, of the whole run with lint and recompile, and after the first block."""
    sizes = (1, *GROWTH)
    times = {n: measure(Shape(n, filler=4, symbolic=symbolic), comm, runs) for n in sizes}
    after = {n - 1: times[n]["pass"] - times[1]["pass"] for n in GROWTH}
    return {
        "comm": comm,
        "sizes": "symbolic" if symbolic else "static",
        "pass": exponent({n: times[n]["pass"] for n in GROWTH}, *GROWTH),
        "with_recompile": exponent({n: times[n]["total"] for n in GROWTH}, *GROWTH),
        "after_first": exponent(after, *after),
    }


def unrelated_row(runs: int) -> dict[str, float]:
    """Microseconds per node that is none of our business: in a graph without blocks, and beside one block."""
    few, many = (Shape(1, filler=n, blocks=False) for n in (1_000, 9_000))
    alone = {s.filler: measure(s, "auto", runs)["total"] for s in (few, many)}
    few, many = (Shape(1, filler=n) for n in (1_000, 9_000))
    beside = {s.filler: measure(s, "mc2", runs) for s in (few, many)}
    return {
        "no_block": 1e6 * slope(alone),
        "beside_blocks": 1e6 * slope({n: t["pass"] for n, t in beside.items()}),
        "lint": 1e6 * slope({n: t["lint"] for n, t in beside.items()}),
        "recompile": 1e6 * slope({n: t["recompile"] for n, t in beside.items()}),
    }


def rival_row(symbolic: bool, layers: int, runs: int) -> dict[str, Any]:
    """Our pass to ``fused_mc2`` and Inductor's matchers on equal graphs, microseconds per block, without recompile. The pass'
    first block counts, since each graph has one; the matchers' registration, once in a process, does not."""
    shape = Shape(layers, symbolic=symbolic)
    matchers = {"register_replacement": replacement_pass(shape), "register_graph_pattern": handler_pass(shape)}
    samples: dict[str, list[float]] = {"ours": [], **{name: [] for name in matchers}}
    for _ in range(runs + 1):  # interleaved, so that what else the machine does hits all alike; the first run warms up
        ours = build(shape)
        samples["ours"].append(run_pass(ours, MoeLowering(DEPLOYMENT, "fused_mc2"))["pass"])
        for name, matcher in matchers.items():
            gm = build(shape)
            done: list[int] = []
            samples[name].append(timed(lambda m=matcher, g=gm, d=done: d.append(apply(m, g))))
            assert done == [layers], done
            assert new_operators(gm, shape) == new_operators(ours, shape), name
    cost = {name: 1e6 * statistics.median(times[1:]) / layers for name, times in samples.items()}
    ratios = {f"{name}_ratio": cost[name] / cost["ours"] for name in matchers}
    return {"sizes": "symbolic" if symbolic else "static", "layers": layers, **cost, **ratios}


def deepseek_row() -> dict[str, Any]:
    """DeepSeek-V3 at full size through the CLI."""
    command = ["lower", "deepseek_v3", "--fake", "--ep", "64", "--tokens", "64", "--json"]
    run = [sys.executable, "-c", "from moe_lowering.cli import main; raise SystemExit(main())", *command]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    try:
        return _with_key(json.loads(done.stdout), "pass_ms")
    except ValueError:
        return {"error": (done.stderr or done.stdout)[-400:]}


def _with_key(found: Any, key: str) -> dict[str, Any]:
    """The numbers beside the first ``key`` in nested JSON."""
    if isinstance(found, dict) and key in found:
        return {k: v for k, v in found.items() if isinstance(v, (int, float))}
    for value in found.values() if isinstance(found, dict) else found if isinstance(found, list) else ():
        if result := _with_key(value, key):
            return result
    return {}


def machine() -> dict[str, Any]:
    model = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_npu": sys.modules["torch_npu"].__version__,
    }


def _cpuinfo() -> list[str]:
    try:
        with open("/proc/cpuinfo") as file:  # noqa: PTH123
            return file.readlines()
    except OSError:
        return []


def table(title: str, rows: list[dict[str, Any]]) -> None:
    """Rows of equal keys as aligned text."""
    print(f"\n{title}")
    cells = [list(rows[0]), *([_text(v) for v in row.values()] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        print("  " + "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"
    return str(value)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="8,64,256", help="numbers of layers, separated by commas")
    parser.add_argument("--runs", type=int, default=5, help="runs of which the median is taken")
    parser.add_argument("--quick", action="store_true", help="up to 32 layers, 3 runs, no growth, no DeepSeek-V3")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    given = parser.parse_args()
    given.layers = [8, 32] if given.quick else [int(n) for n in given.layers.split(",")]
    given.runs = 3 if given.quick else given.runs
    return given


def main() -> None:
    given = arguments()
    results: dict[str, Any] = {"machine": machine()}
    kinds = [(comm, symbolic) for symbolic in (False, True) for comm in COMMS]
    results["block_us"] = [block_row(*kind, given.layers, given.runs) for kind in kinds]
    results["unrelated_node_us"] = [unrelated_row(given.runs)]
    results["inductor_us_per_block"] = [rival_row(s, 32 if given.quick else 64, given.runs) for s in (False, True)]
    if not given.quick:
        results["growth_exponent_8_to_512"] = [growth_row(*kind, min(given.runs, 3)) for kind in kinds]
        results["deepseek_v3"] = [deepseek_row()]
    if given.json:
        print(json.dumps(results, indent=2))
        return
    print(", ".join(f"{name} {value}" for name, value in results["machine"].items()))
    for name, rows in results.items():
        if name != "machine":
            table(name, rows)


if __name__ == "__main__":
    main()
