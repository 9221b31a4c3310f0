"""The page of ``explain --html``: ``explain_page`` for one deployment, ``table_page`` for several."""

from __future__ import annotations

from collections.abc import Sequence

from moe_lowering.cli.html.choice_drawing import draw_choices
from moe_lowering.cli.html.page import element, items, page
from moe_lowering.cli.html.parts import cost_table, deployment_table, verdict_table
from moe_lowering.explanation import Explanation
from moe_lowering.explanation.table import Row
from moe_lowering.explanation.text import change_texts, size_text
from moe_lowering.number_words import UNITS, count_of


def explain_page(explanation: Explanation, rows: Sequence[Row]) -> str:
    """Of one deployment. ``rows``: the choice over tokens and EP sizes."""
    answer, block = explanation.answer, explanation.block
    deployment = answer.deployment
    facts = [
        describe_block(explanation),
        f"{deployment.soc}, EP {deployment.ep_size}, TP {deployment.tp_size}, {count_of(answer.tokens, 'token')} of a rank, "
        f"HCCL_BUFFSIZE {deployment.hccl_buffer_mb} MB, weights {deployment.weight_format}, unpermute operator "
        f"{deployment.unpermute_operator}{'' if deployment.capture else ', not captured'}",
        f"choice: {answer.choice or 'none'} ({answer.reason})",
        str(answer.beside_rule()),
        f"memory: {answer.memory(block.layers)}",
        f"units: {UNITS}",
    ]
    changes = change_texts(explanation)
    return page(
        f"{block.title} on {deployment.soc}",
        [
            items(facts),
            *([element("h2", "One change that would help"), items(changes)] if changes else []),
            element("h2", "Verdicts"),
            verdict_table(answer.judgement.verdicts, answer.choice),
            element("h2", "Kernels, bytes and cost"),
            cost_table(answer.costs()),
            element("h2", "The choice over tokens and EP sizes"),
            draw_choices(rows),
            element("h2", "Assumed"),
            items(explanation.assumptions),
        ],
    )


def table_page(first: Explanation, rows: Sequence[Row]) -> str:
    """Of several deployments."""
    return page(
        f"{first.block.title} in several deployments",
        [
            items([describe_block(first)]),
            element("h2", "The choice over tokens and EP sizes"),
            draw_choices(rows),
            element("h2", "Deployments"),
            element(
                "p",
                f"Figures are those at the most tokens of a row; memory is that of all MoE layers. {UNITS}.",
                class_="note",
            ),
            deployment_table(rows),
            element("h2", "Assumed"),
            items(first.assumptions),
        ],
    )


def describe_block(explanation: Explanation) -> str:
    """Sizes and words of the block in one line."""
    return f"{size_text(explanation.block)}, {explanation.block.activation}"
