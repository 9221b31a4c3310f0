"""What the pass adds to a trace that ``TORCH_TRACE`` takes, for tlparse: its report, and the graph before and after.

Without a trace nothing is written and no graph is printed. A failure here must not fail a compile.
"""

from __future__ import annotations

import functools
import logging

from torch._logging._internal import trace_log, trace_structured
from torch.fx import GraphModule

from moe_lowering.report.records import LoweringReport

log = logging.getLogger(__name__)
REPORT, BEFORE, AFTER = "moe_lowering_report", "moe_lowering_graph_before", "moe_lowering_graph_after"


def is_traced() -> bool:
    """Whether ``TORCH_TRACE`` names a directory. Other handlers (pytest adds some to every logger) are not worth the text of a
    graph for each pass."""
    return any(getattr(handler, "root_dir", None) is not None for handler in trace_log.handlers)


def readable_graph(gm: GraphModule) -> str:
    """The graph as text where a trace is taken; "" where none is."""
    if not is_traced():
        return ""
    try:
        return gm.print_readable(print_output=False)
    except Exception:  # a graph that cannot be printed is lowered all the same
        log.warning("moe_lowering: the graph cannot be written to the trace", exc_info=True)
        return "it cannot be printed"


def write_artifacts(before: str, gm: GraphModule, report: LoweringReport) -> None:
    """Add the artefacts of one pass to the trace, if one is taken."""
    if not is_traced():
        return
    try:
        for name, text in ((BEFORE, before), (AFTER, readable_graph(gm)), (REPORT, str(report))):
            trace_structured(
                "artifact",
                metadata_fn=functools.partial(dict, name=name, encoding="string"),
                payload_fn=functools.partial(str, text),
                expect_trace_id=False,
            )
    except Exception:
        log.warning("moe_lowering: the report cannot be written to the trace", exc_info=True)
