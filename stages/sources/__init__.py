"""Sources: where samples come from, one file per kind."""
