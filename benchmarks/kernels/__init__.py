"""One table per kernel: inputs, sizes, work, rivals, launch configs to try, error checks.

May import: benchmarks.measure, kernels, reference.
"""
