"""Serves a model over HTTP, with the endpoints of OpenAI's API.

May import: causal_lm, compat, demo, engine, text.
"""
