"""Benchmark suites and accuracy checks, one file per kernel; suite.py defines both and runs suites.

May import: benchmarks.measure, kernels, reference.
"""
