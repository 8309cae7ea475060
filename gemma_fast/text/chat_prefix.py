"""`chat_prefix` returns the tokens that chats with one system message have in common."""

from __future__ import annotations

import os

from gemma_fast.text.tokenizer import Tokenizer


def chat_prefix(tokenizer: Tokenizer, system: str) -> list[int]:
    """Returns the ids with which all chats begin that have this system message. Raises ValueError
    if the chat template has no place for it."""
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "system", "content": system}, {"role": "user", "content": text}],
            add_generation_prompt=True,
        ).input_ids
        for text in ("a", "B")
    ]
    return list(os.path.commonprefix(chats))  # noqa: RUF071
