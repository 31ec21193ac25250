"""`pipeline report`: one self-contained HTML page about a run, a store or a training."""

from stages.browse.report.command import report_command

__all__ = ["report_command"]
