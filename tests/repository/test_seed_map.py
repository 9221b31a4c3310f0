"""docs/seed_map.md: every row names something that exists."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from moe_lowering.limits import load

PAGE = Path(__file__).parents[2] / "docs" / "seed_map.md"
NAME = re.compile(r"`(moe_lowering[\w.]*)(?:\((\w+)\))?`")
CODE = re.compile(r"\[([a-z_0-9]+\.[a-z_0-9]+)\]")
SEED = """
hidden_states router_logits enable_shared_expert_dp replace_allreduce quant_type reduce_results w1 w2
topk_weights topk_ids activation apply_router_weight_on_input use_int8_w8a8 use_int4_w4a8 use_int4_w4a16 global_num_experts
expert_map w1_scale w2_scale w1_scale_bias w2_scale_bias w1_offset w2_offset log2phy
need_trans dynamic_eplb mc2_mask pertoken_scale routed_out before_dispatch_evt before_combine_evt group_list_type
expert_tokens
"""
KNOWN_CODES = {row.code for row in load()}


INTEGRATIONS = Path(__file__).parents[2] / "moe_lowering" / "integrations"


def plugin_codes() -> set[str]:
    """The codes that the plugin of vLLM refuses a layer with, from its source."""
    text = "".join(path.read_text() for path in INTEGRATIONS.glob("vllm*.py"))
    written = re.findall(r"\[(vllm\.\w+)\]", text)
    called = re.findall(r"refuse\(\s*\"(\w+)\"", text)
    features = re.findall(r"^ {8}\"(\w+)\": \(\"", (INTEGRATIONS / "vllm_layers.py").read_text(), re.MULTILINE)
    return {*written, *(f"vllm.{code}" for code in (*called, *features))}


def rows() -> list[tuple[str, str, str]]:
    """(seed, here, in the plugin of vLLM) of each row."""
    cells = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert all(len(row) == 3 for row in cells)
    return [(seed, here, plugin) for seed, here, plugin in cells if seed != "seed"]


def find(name: str) -> Any:
    """The object of a dotted name, from its longest importable prefix."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise LookupError(name)


def names_in(cell: str) -> list[tuple[str, str]]:
    """The names of a cell, which exist."""
    names: list[tuple[str, str]] = NAME.findall(cell)
    for name, argument in names:
        found = find(name)
        assert not argument or argument in inspect.signature(found).parameters, f"{name} has no argument {argument}"
    return names


@pytest.mark.parametrize(("seed", "here", "plugin"), rows(), ids=[seed for seed, *_ in rows()])
def test_a_row_names_what_exists(seed: str, here: str, plugin: str) -> None:
    names, codes = names_in(here), CODE.findall(here)
    assert set(codes) <= KNOWN_CODES
    explained = ("not an argument", "values of the graph", "the result of the last exchange", "per-expert lists")
    assert names or codes or here.startswith(explained), "a row must say where, or why not"
    refused = CODE.findall(plugin)
    assert set(refused) <= plugin_codes()
    assert names_in(plugin) or refused or plugin.startswith("not taken over: "), "a row must say where, or why not"


def test_every_name_of_the_seed_has_a_row() -> None:
    given = " ".join(seed for seed, *_ in rows())
    assert [name for name in SEED.split() if not re.search(rf"\b{name}\b", given)] == []


def test_codes_of_the_plugin_are_read_from_its_source() -> None:
    """The twin: a code that nothing raises is not among them; and the page of the plugin has them all."""
    codes = plugin_codes()
    assert {
        "vllm.eager",
        "vllm.quantisation",
        "vllm.dynamic_eplb",
        "vllm.arguments",
    } <= codes and "vllm.magic" not in codes
    page = set(CODE.findall((PAGE.parent / "vllm.md").read_text()))
    assert codes == {code for code in page if code.startswith("vllm.")}


def test_a_name_that_does_not_exist_fails() -> None:
    with pytest.raises(AttributeError):
        find("moe_lowering.functional.no_such_function")
