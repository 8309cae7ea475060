"""Generates token ids from token ids: requests, sampling, stopping, decoders, generate()'s loop.

May import: config, memory, compat, model.
"""
