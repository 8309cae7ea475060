"""Text ↔ token ids: tokenizer, chat templates, streaming.

May import: compat, checkpoint.hub, checkpoint.gguf_reader.
"""
