"""GE converter of ``assert_agreement``.

A GE graph has no host code, so ranks are compared where torchair prepares the inputs of a call, as ``assert_tokens`` is
checked (``ge_rewrites``, ``ge_converters``). That code is part of torchair's generated program, also in its compile cache,
and runs before the engine does.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_lowering.backends import ge_converters, ge_missing, ge_rewrites
from moe_lowering.custom_ops import assert_agreement
from moe_lowering.custom_ops.library import register as register_operator
from moe_lowering.custom_ops.sizes import token_count
from moe_lowering.passes.agreement_check import ASSERT_AGREEMENT
from moe_lowering.passes.graph.edit_log import EditLog


def _check(x: Tensor, group: str, timeout: float, settings: str, blocks: str, tokens: str) -> None:
    assert_agreement.check(token_count(x.shape), group, timeout, settings, blocks)


def _do_nothing(x: Tensor, group: str, timeout: float, settings: str, blocks: str, tokens: str) -> None:
    """Returns nothing, like ``assert_agreement`` itself."""


register_operator(
    "ge_assert_agreement(Tensor x, str group, float timeout, str settings, str blocks, str tokens) -> ()",
    cpu=_check,
    npu=_check,
    fake=_do_nothing,
    side_effect=True,
)


@functools.cache
def register() -> None:
    """Give torchair the converter, once."""
    from torchair import register_fx_node_ge_converter as converter

    converter(torch.ops.moe_lowering.ge_assert_agreement.default)(_convert)


def place_agreement_checks(edits: EditLog) -> None:
    """``assert_agreement`` to ``ge_assert_agreement``, with the Python that computes T from ``args``, the graph's inputs."""
    with edits.step():
        for node in edits.graph.find_nodes(op="call_function", target=ASSERT_AGREEMENT):
            _place_check(edits, node)


def _place_check(edits: EditLog, node: Node) -> None:
    x: Any = node.args[0]
    tokens = token_count(x.meta["val"].shape)
    if isinstance(tokens, int):
        source = str(tokens)
    else:
        try:
            source = ge_rewrites._source(edits.graph, node, tokens)
        except ge_missing.GeConversionError:  # then T is left out of the comparison
            source = str(assert_agreement.UNKNOWN)
    with edits.graph.inserting_before(node):
        edits.graph.call_function(torch.ops.moe_lowering.ge_assert_agreement.default, (*node.args, source))
    edits.erase([node])


def _convert(x: Any, group: str, timeout: float, settings: str, blocks: str, tokens: str) -> None:
    """Attach the comparison to an input of the graph; to one that ``x`` is computed from, if there is such an input."""
    from torchair.ge._ge_graph import get_default_ge_graph

    graph = get_default_ge_graph()
    names = ge_converters._inputs_of(graph, x) or list(graph.named_inputs_info)
    infos = [graph.named_inputs_info[name] for name in names]
    if not infos:
        raise ge_converters.ConversionError(
            "ge_assert_agreement: the graph has no input, so there is nothing to attach the comparison of the ranks to"
        )
    info = next((info for info in infos if info.value_type.name == "TENSOR"), infos[0])
    info.func = ge_converters._check_input(info.func, _line(group, timeout, settings, blocks, tokens))


def _line(group: str, timeout: float, settings: str, blocks: str, tokens: str) -> str:
    module = "moe_lowering.custom_ops.assert_agreement"
    return (
        f"__import__({module!r}, fromlist=['check']).check({tokens}, {group!r}, {timeout!r}, {settings!r}, {blocks!r})"
    )
