"""Files → named tensors and their config. Everything in a file is untrusted.

May import: config, memory.
"""
