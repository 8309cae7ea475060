"""The machine and its roof (peak rates), timing, and the writing and plotting of results.

May import: kernels.
"""
