"""Text ↔ token ids: tokenizer, padding, chat templates, streaming.

May import: compat, checkpoint.hub, checkpoint.gguf_reader.
"""
