"""Loads a config and named tensors, from untrusted files or from a transformers model in memory.

May import: config, kernels, ranges.
"""
