"""`pipeline report`: one self-contained HTML page about a run or a store."""

from stages.report.command import report_command

__all__ = ["report_command"]
