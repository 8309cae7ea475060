"""Accuracy checks of `gemma-fast verify`: kernels and model are compared with exact references.

May import: everything in gemma_fast but cli.
"""
