"""A suite for each kernel: inputs, sizes, work, rivals; and what checks and times them.

May import: benchmarks.measure, kernels.
"""
