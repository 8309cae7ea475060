"""The machine and its roof, timing, and how results are written and plotted.

May import: kernels.
"""
