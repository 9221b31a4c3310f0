"""Lowered graphs do not depend on the order of sets: each rank has hashes and addresses of its own."""

import os
import subprocess
import sys
from pathlib import Path

from edit_faults import CASES, lowering, quiet
from graph_build import build

ROOT = Path(__file__).parents[2]


def graphs():
    """Every case's graph after the pass, with the record that ranks compare, and what became of its blocks."""
    texts = []
    for name, case in CASES.items():
        built, graph_pass = build(case), lowering(case)
        with quiet():
            graph_pass(built.gm)
        blocks = [(block.comm, block.reason) for report in graph_pass.reports for block in report.blocks]
        texts.append(f"{name}\n{built.gm.code}\n{blocks}")
    return "\n".join(texts)


def test_another_process_makes_the_same_graphs():
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    folders = [ROOT, ROOT / "tests" / "helpers", Path(__file__).parent]
    program = (
        "import moe_lowering; from moe_lowering import simulator; simulator.enable('A3'); import test_hash_seeds as own; "
        "print('#', len({'a', 'b', 'c'})); print(own.graphs())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "PYTHONHASHSEED": seed}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.partition("# 3\n")[2].strip() == graphs().strip()
