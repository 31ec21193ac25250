"""`python -m pipeline.cli`: the command `pipeline`, where its script is not on the path."""

from pipeline.cli.main import main

main()
