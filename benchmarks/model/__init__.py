"""The whole model against rivals: cases, providers, correctness check (judge), timing (race).

May import: everything in gemma_fast but cli.
"""
