"""Gemma's weights, its steps and its KV cache: tensors in, tensors out; no files, no text.

May import: config, kernels.
"""
