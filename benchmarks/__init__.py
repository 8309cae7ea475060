"""Benchmarks of each kernel and of the whole model, and the checks of `gemma-fast verify`.

May import: everything in gemma_fast but cli.
"""
