"""The report of a lowering: records (this package's ``records``), and their rendering as text."""

from moe_lowering.report.records import BlockReport, LoweringReport, NotCapturable, Size, Sizes, Verdict, Window

__all__ = ["BlockReport", "LoweringReport", "NotCapturable", "Size", "Sizes", "Verdict", "Window"]
