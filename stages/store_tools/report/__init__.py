"""`pipeline report`: one self-contained HTML page about a run or a store."""

from stages.store_tools.report.command import report_command

__all__ = ["report_command"]
