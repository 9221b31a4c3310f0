"""The report of a lowering: its records (``records``), its text (``text``), and the cost of a lowered graph (``graph_costs``)."""

from moe_lowering.report import text as text  # the records' str() is its
from moe_lowering.report.leftovers import NotCapturable
from moe_lowering.report.records import BlockReport, LoweringReport, Verdict
from moe_lowering.report.sizes import Size, Sizes, Window

__all__ = ["BlockReport", "LoweringReport", "NotCapturable", "Size", "Sizes", "Verdict", "Window"]
