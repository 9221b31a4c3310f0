"""Two layers of experts that read one tensor of ids are two blocks: side by side, or one behind the other."""

from __future__ import annotations

import pytest
import torch
from foreign_forms import FORMS
from raise_graphs import lower, run, trace
from reference import relative_error
from torch._functorch.compile_utils import fx_graph_cse

NAMES = ("grouped_mm, float32", "titan, bmm", "batched_mm", "gpt-fast, float32")
HOW = ("beside", "beside, other tokens", "behind")
CASES = [(name, how) for name in NAMES for how in HOW]
CASES += [("grouped_mm, transposed, biased, gpt-oss", "behind at once"), ("batched_mm", "results of the first doubled")]


def pair(name, how):
    """(a function of all tensors, the tensors, the reference) of two layers of a form."""
    layer = FORMS[name]
    made = layer.make()
    other = {f"other_{key}": tensor for key, tensor in layer.make(7).items() if key not in ("ids", "weights")}

    def both(call, t):
        first = {key: tensor for key, tensor in t.items() if not key.startswith("other_")}
        second = {key: t.get(f"other_{key}", t[key]) for key in first}
        y = call(first)
        if how == "beside, other tokens":
            return y + call(second)
        x = t["x"]
        if how != "beside":
            scaled = y * 2 if "doubled" in how else y
            x = (scaled if how == "behind at once" else x + scaled / 16).to(x.dtype)
        return y + call({**second, "x": x})

    tensors = {**made, **other}
    return lambda **t: both(lambda each: layer.function(**each), t), tensors, both(layer.reference, tensors)


def graph(name, how, merged):
    function, tensors, expected = pair(name, how)
    gm = trace(function, tensors)
    if merged:  # as AOTAutograd does: one sort, one histogram for both
        gm.graph = fx_graph_cse(gm.graph)
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return gm, tensors, expected


@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
@pytest.mark.parametrize(("name", "how"), CASES)
def test_each_is_a_block(name, how, merged):
    gm, tensors, expected = graph(name, how, merged)
    report = lower(gm, strict=True)
    assert [block.comm for block in report.blocks] == ["allgather"] * 2 and report.foreign == ()
    left = {str(node.target) for node in gm.graph.nodes} & {
        "aten.sort.default",
        "aten.histc.default",
        "aten.bmm.default",
    }
    assert not left and not any("grouped_mm" in str(node.target) for node in gm.graph.nodes)
    after = run(gm, tensors)
    assert relative_error(after, expected) < (1e-5 if after.dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("other", [0, 1])
@pytest.mark.parametrize("name", ["grouped_mm, float32", "batched_mm"])
def test_one_of_them_that_is_no_layer_leaves_the_other(name, other):
    """A relu of the rows of one: it stays, with what both read."""
    gm, tensors, _ = graph(name, "beside", merged=True)
    anchors = [node for node in gm.graph.nodes if "grouped_mm" in str(node.target) or "aten.bmm" in str(node.target)]
    product = anchors[1 + 2 * other]
    with gm.graph.inserting_after(product):
        changed = gm.graph.call_function(torch.ops.aten.relu.default, (product,))
    changed.meta["val"] = product.meta["val"].clone()
    product.replace_all_uses_with(changed, delete_user_cb=lambda user: user is not changed)
    gm.recompile()
    before = run(gm, tensors)
    report = lower(gm)
    assert [block.comm for block in report.blocks] == ["allgather"] and len(report.foreign) == 1
    assert len([node for node in gm.graph.nodes if node in anchors]) == 2
    assert relative_error(run(gm, tensors), before) < (1e-5 if before.dtype == torch.float32 else 3e-2)
