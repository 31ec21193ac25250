"""Executors: the same tasks run by Ray or by plain local processes."""
