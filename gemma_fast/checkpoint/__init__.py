"""Loads named tensors and a config from files or a live transformers model. Files are untrusted.

May import: config.
"""
