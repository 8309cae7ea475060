"""`python -m gemma_fast` runs the command `gemma-fast`, even in a clone that is not installed."""

from gemma_fast.cli.commands import main

main(prog_name="gemma-fast")
