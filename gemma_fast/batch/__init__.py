"""Files of prompts → files of answers, on one machine or with Ray Data on many.

May import: causal_lm, compat, engine, text.
"""
