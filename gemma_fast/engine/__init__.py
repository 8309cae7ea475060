"""Generates token ids: requests, sampling, stopping, decoders, and the loop of generate().

May import: config, kernels.cpu, memory, compat, model.
"""
