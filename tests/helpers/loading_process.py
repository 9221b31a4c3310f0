"""Peak memory of loading, in a process of its own: prints what each rank keeps and how far the process grew, as JSON.

    python loading_process.py FOLDER RANKS...

The kernel's own high-water mark is set back before each way (``/proc/self/clear_refs``), so that one process measures all.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

import moe_lowering.simulator

moe_lowering.simulator.enable("A3")

import torch  # noqa: E402
from loading_models import deployment, load_all, on_meta  # noqa: E402
from transformers import AutoConfig, logging  # noqa: E402

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def measure(make) -> dict[str, int]:
    """Bytes that stay in a model's tensors, and bytes by which the process had grown at most."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    model = make()
    peak = status("VmHWM") - before
    tensors = {tensor.data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return {"kept": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()), "peak": peak}


def main(folder: str, *counts: str) -> None:
    config = AutoConfig.from_pretrained(folder)
    small, results = sys.argv[1] + "-small", {}
    # What is loaded once
    moe_lowering.load_experts(on_meta(AutoConfig.from_pretrained(small)), small, deployment(2, 0))
    load_all(AutoConfig.from_pretrained(small), small)
    for ranks in map(int, counts):
        place = deployment(ranks, ranks - 1)
        own = measure(lambda place=place: moe_lowering.load_experts(on_meta(config), folder, place))
        whole = measure(lambda place=place: moe_lowering.shard_experts(load_all(config, folder), place))
        results[ranks] = {"own": own, "all": whole}
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
