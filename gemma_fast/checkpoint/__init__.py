"""Files, or a live transformers model → named tensors and a config. Every file is untrusted.

May import: config.
"""
