"""A run folder made readable: one picture, tables, and a page that holds them all."""

from cvlm.report.arms import draw_arms
from cvlm.report.html import write_report
from cvlm.report.tables import Table, baseline_table, comparison_table, cost_table, result_table

__all__ = [
    "Table",
    "baseline_table",
    "comparison_table",
    "cost_table",
    "draw_arms",
    "result_table",
    "write_report",
]
