"""The result that a command of the stages returns to the command line."""

CommandResult = tuple[dict[str, object], list[str], int]
"""The result as a JSON value, the lines to print, the exit code."""
