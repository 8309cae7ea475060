"""Benchmarks of a whole model and its rivals: cases, providers, correctness check (judge.py) and
timing (race.py).

May import: everything in gemma_fast but cli.
"""
