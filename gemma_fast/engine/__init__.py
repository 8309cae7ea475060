"""Token ids → token ids: requests, sampling, decoders and the loop of generate().

May import: model, kernels, config, memory, compat.
"""
