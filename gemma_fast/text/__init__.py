"""Converts text to token ids and back: tokenizer, padding, chat templates, streaming.

May import: compat, checkpoint.hub, checkpoint.gguf_reader.
"""
