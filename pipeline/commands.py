"""What a reading command returns to the command line."""

CommandResult = tuple[dict[str, object], list[str], int]
"""JSON-able result, lines for people, exit code."""
