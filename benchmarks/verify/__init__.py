"""The certificate of `gemma-fast verify`: kernels and model against exact references.

May import: everything in gemma_fast but cli.
"""
