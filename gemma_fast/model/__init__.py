"""Gemma's weights, forward pass and KV cache. This folder handles tensors only, no files or text.

May import: config, kernels.
"""
