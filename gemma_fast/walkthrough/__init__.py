"""Explains a model with pictures of its steps for one prompt: prompt → numbers → pictures → page.

May import: __init__, checkpoint, config, load, memory, reference, reference_steps, text.
"""
