"""Explains a model with pictures of it at work: prompt → data → pictures → one page.

May import: __init__, checkpoint, config, load, memory, reference, text.
"""
