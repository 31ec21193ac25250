"""The engine: configuration, stages, plans, run folders, executors and the command line."""
