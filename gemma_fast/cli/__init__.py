"""The command `gemma-fast`: one module for each group of subcommands, and the options they share.

May import: compat, causal_lm, text, demo, batch, server, benchmarks, walkthrough.
"""
