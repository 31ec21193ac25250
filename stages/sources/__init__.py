"""Sources: where samples come from, one file a kind."""
