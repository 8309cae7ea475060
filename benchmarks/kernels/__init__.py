"""The one table of each kernel: inputs, sizes, work, rivals, tiles to try, checks of its error.

May import: benchmarks.measure, kernels, reference.
"""
