"""Graphs of transformers models without experts: nothing is to be found in them, and the pass is to cost next to nothing.

    python benchmarks/dense_models.py --graphs 500 --out dense.jsonl      # goes on where it stopped
    python benchmarks/dense_models.py --out dense.jsonl --table           # what is there so far

Every type that transformers' AutoModel knows, but for the families with experts, is built from its own default config, with few
layers, and traced with make_fx: fake tensors, so that neither memory nor weights are needed. What cannot be built or traced so
(data-dependent control flow, inputs that cannot be guessed) is counted and left. Kinds of graphs: ``KINDS``.

Two graphs of a type with the same operators, in the same places, count once.

Times are CPU time of the thread that runs the pass, the least of five runs on the same graph, which it does not change.
A process for each type, forked from one that has imported transformers; a type that takes too long is given up.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_lowering import simulator  # first: it lets torch be imported where torch_npu is installed without CANN

simulator.enable()

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.fx import GraphModule  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.fx.experimental.symbolic_shapes import ShapeEnv  # noqa: E402

from moe_lowering import Deployment, MoeLowering  # noqa: E402
from moe_lowering.families.listing import families, model_type  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a model is traced. ``cached``: with a cache of keys and values where it has one; ``train``: with dropout."""

    dtype: torch.dtype = torch.bfloat16
    sizes: tuple[int, int] = (2, 33)  # batch and tokens
    symbolic: bool = False
    cached: bool = False
    train: bool = False


KINDS = {
    "bfloat16": Kind(),
    "float32": Kind(torch.float32),
    "symbolic sizes": Kind(symbolic=True),
    "with a cache": Kind(cached=True),
    "in training": Kind(train=True),
    "float32, symbolic sizes, with a cache": Kind(torch.float32, symbolic=True, cached=True),
}
LAYERS = 4
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers",
          "num_encoder_layers", "num_decoder_layers")  # fmt: skip
PARTS = ("text_config", "vision_config", "audio_config", "encoder", "decoder")  # configs in a config
RUNS = 5
PATIENCE = 120  # seconds for all graphs of a type


def dense_types() -> list[str]:
    """Types of AutoModel's table without those of the families with experts, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    with_experts = {model_type(family) for family in families()} | set(families())
    of_experts = tuple(name.removesuffix("_text") for name in with_experts)
    return sorted(name for name in MODEL_MAPPING_NAMES if not name.startswith(of_experts) and "moe" not in name)


def build(name: str, dtype: torch.dtype) -> Any:
    """A model of a type with few layers. In a fake mode its weights are fake."""
    from transformers import CONFIG_MAPPING, AutoModel

    config = CONFIG_MAPPING[name]()
    _cut_depth(config)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return AutoModel.from_config(config, attn_implementation="eager").eval()
    finally:
        torch.set_default_dtype(previous)


def _cut_depth(config: Any) -> None:
    for part in (config, *(getattr(config, name, None) for name in PARTS)):
        for name in DEPTHS:
            if isinstance(getattr(part, name, None), int) and getattr(part, name) > LAYERS:
                try:
                    setattr(part, name, LAYERS)
                except Exception:  # a config that derives it: the model stays as deep as it is
                    continue
        if isinstance(getattr(part, "layer_types", None), list):
            part.layer_types = part.layer_types[:LAYERS]


def inputs_of(model: Any, batch: int, tokens: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Inputs by what the model says is its main one."""
    config, main = model.config, model.main_input_name
    ids = torch.ones((batch, tokens), dtype=torch.int64)
    if main == "pixel_values":
        part = getattr(config, "vision_config", None) or config
        size = getattr(part, "image_size", None) or 64
        sides = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        return {main: torch.zeros((batch, getattr(part, "num_channels", 3), *sides), dtype=dtype)}
    if main == "input_features":
        bins = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", 80)
        found = {main: torch.zeros((batch, bins, 2 * getattr(config, "max_source_positions", 50)), dtype=dtype)}
    elif main == "input_values":
        found = {main: torch.zeros((batch, 4_000), dtype=dtype)}
    else:
        found = {"input_ids": ids}
    if getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = ids
    return found


class Tracer:
    """Traces one type; a model is built once for each dtype."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.models: dict[torch.dtype, Any] = {}

    def trace(self, kind: str) -> GraphModule:
        """The graph of a kind."""
        how = KINDS[kind]
        dtype, (batch, tokens), symbolic = how.dtype, how.sizes, how.symbolic
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv() if symbolic else None)
        if dtype not in self.models:
            with FakeTensorMode(), torch.no_grad():
                self.models[dtype] = build(self.name, dtype)
        model = self.models[dtype].train(how.train)
        given = inputs_of(model, batch, tokens, dtype)
        keys = list(given)
        cached = {"use_cache": how.cached} if hasattr(model.config, "use_cache") else {}
        for tensors in (model.named_parameters(), model.named_buffers()):
            for tensor_name, tensor in list(tensors):
                owner, _, last = tensor_name.rpartition(".")
                of = model.get_submodule(owner)
                with mode:  # each mode takes its own fake tensors only
                    fresh = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                if last in of._parameters:
                    of._parameters[last] = torch.nn.Parameter(fresh, requires_grad=False)
                else:
                    of._buffers[last] = fresh

        def forward(*values: torch.Tensor) -> list[torch.Tensor]:
            result = model(**dict(zip(keys, values, strict=True)), **cached)
            leaves = torch.utils._pytree.tree_leaves(tuple(result.values()))
            return [each for each in leaves if isinstance(each, torch.Tensor)]

        inputs = [mode.from_tensor(value, static_shapes=not symbolic) for value in given.values()]
        with mode, torch.no_grad():
            return make_fx(forward, tracing_mode="real")(*inputs)


def measure(gm: GraphModule) -> dict[str, Any]:
    """What the pass finds in a graph, and microseconds for each node."""
    nodes, least, report = len(gm.graph.nodes), float("inf"), None
    for _ in range(RUNS):
        lowering = MoeLowering(Deployment(soc="A3"))
        start = time.thread_time()
        lowering(gm, agreement_timeout=None)
        least, report = min(least, time.thread_time() - start), lowering.reports[0]
    assert report is not None
    return {
        "nodes": nodes,
        "microseconds": 1e6 * least,
        "blocks": len(report.blocks),
        "routers": len(report.routers),
        "foreign": [
            f"[{layer.code}] {layer.operation}" if hasattr(layer, "operation") else str(layer)
            for layer in report.foreign
        ],
        "unchanged": len(gm.graph.nodes) == nodes,
        "graph": fingerprint(gm),
    }


def fingerprint(gm: GraphModule) -> str:
    """A hash of the operators in their order, and of which value each reads: sizes and dtypes are not in it."""
    numbers = {node: number for number, node in enumerate(gm.graph.nodes)}
    lines = (
        f"{n.op} {n.target if n.op != 'placeholder' else ''} {[numbers[i] for i in n.all_input_nodes]}" for n in numbers
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def attempt(name: str) -> list[dict[str, Any]]:
    """A row for each kind of graph; ``error`` where there is none."""
    rows: list[dict[str, Any]] = []
    tracer = Tracer(name)
    for kind in KINDS:
        row: dict[str, Any] = {"type": name, "kind": kind}
        if rows and all("error" in done for done in rows):
            rows.append(row | {"error": "as the kinds before"})
            continue
        try:
            row |= measure(tracer.trace(kind))
            if row["graph"] in {done.get("graph") for done in rows}:  # a model without dropout, in training
                row["error"] = "the same operators as another kind's graph"
        except Exception as error:  # of any model's code, which is not ours to judge
            row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        rows.append(row)
    return rows


def _child(sender: Any, name: str) -> None:
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable()
    sender.send(attempt(name))


def in_process(name: str) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, name))
    child.start()
    sender.close()
    try:
        rows: list[dict[str, Any]] = receiver.recv() if receiver.poll(PATIENCE) else []
    except EOFError:
        rows = []
    child.kill()
    child.join()
    return rows or [{"type": name, "kind": "", "error": f"nothing within {PATIENCE} s"}]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(path: Path, wanted: int) -> Iterator[str]:
    rows = read(path)
    done, graphs = {row["type"] for row in rows}, sum("error" not in row for row in rows)
    for name in dense_types():
        if graphs >= wanted:
            return
        if name in done:
            continue
        found = in_process(name)
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
        graphs += sum("error" not in row for row in found)
        yield f"{graphs:4d} graphs  {name}: {sum('error' not in row for row in found)} of {len(KINDS)}"


def table(rows: list[dict[str, Any]]) -> str:
    """What was found, as text."""
    graphs = [row for row in rows if "error" not in row]
    if not graphs:
        return "no graphs"
    each = sorted(row["microseconds"] / row["nodes"] for row in graphs)
    nodes, spent = sum(row["nodes"] for row in graphs), sum(row["microseconds"] for row in graphs)
    line = statistics.linear_regression([row["nodes"] for row in graphs], [row["microseconds"] for row in graphs])
    lines = [
        f"graphs {len(graphs)} of {len({row['type'] for row in graphs})} types; types without a graph "
        f"{len({row['type'] for row in rows} - {row['type'] for row in graphs})}",
        f"nodes {nodes}, from {min(row['nodes'] for row in graphs)} to {max(row['nodes'] for row in graphs)}",
        f"blocks {sum(row['blocks'] for row in graphs)}, routers {sum(row['routers'] for row in graphs)}, reported as foreign "
        f"{sum(len(row['foreign']) for row in graphs)}, graphs changed {sum(not row['unchanged'] for row in graphs)}",
        f"microseconds for each node: all {spent / nodes:.2f}, median {statistics.median(each):.2f}, 95 % "
        f"{each[int(0.95 * len(each))]:.2f}, most {each[-1]:.2f}",
        f"as a line: {line.intercept:.0f} us for a graph and {line.slope:.2f} us for each node",
    ]
    for kind in KINDS:
        own = [row for row in graphs if row["kind"] == kind]
        if own:
            lines.append(
                f"  {kind}: {len(own)}, {sum(r['microseconds'] for r in own) / sum(r['nodes'] for r in own):.2f} us"
            )
    for row in graphs:
        if row["blocks"] or row["routers"] or row["foreign"] or not row["unchanged"]:
            lines.append(
                f"  found in {row['type']}, {row['kind']}: {row['blocks']} blocks, {row['routers']} routers, {row['foreign']}"
            )
    reasons = collections.Counter(row["error"].split(":")[0] for row in rows if "error" in row)
    lines.append("not traced: " + ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(8)))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("dense_models.jsonl"))
    parser.add_argument("--table", action="store_true", help="print what is there, and make no graphs")
    given = parser.parse_args()
    if not given.table:
        import transformers.models.auto.modeling_auto  # noqa: F401  (imported once, before the forks)

        for line in run(given.out, given.graphs):
            print(line, file=sys.stderr, flush=True)
    print(table(read(given.out)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
