"""Streams text: receives token ids, and writes each character as soon as it is complete."""

import sys
from collections.abc import Callable
from queue import Queue

from torch import Tensor

from gemma_fast.text.tokenizer import Tokenizer

MAX_HELD = 16  # ids that may wait for a complete character, which has at most four bytes


class TextStreamer:
    """Writes text during `generate`, which passes the prompt, then each new token, to `put`.

    `write` receives pieces of text that are not empty and do not end inside a character. Joined,
    they equal `tokenizer.decode` of the same ids, unless the bytes are not valid UTF-8.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        write: Callable[[str], object] | None = None,
        *,
        skip_prompt: bool = True,
        skip_special_tokens: bool = True,
    ):
        """write  receives each piece of text; default: prints it at once, without a newline"""
        self.tokenizer, self.write = tokenizer, write or _print
        self.skip_prompt, self.skip_special_tokens = skip_prompt, skip_special_tokens
        self._held: list[int] = []
        self._at_prompt = True

    def put(self, ids: Tensor) -> None:
        """Writes the text that ids :: [t] or [1, t] complete. The first call passes the prompt.
        Raises ValueError for a batch."""
        if ids.dim() > 1 and len(ids) > 1:
            raise ValueError(
                f"a TextStreamer shows one text, not a batch of {len(ids)}: pass one prompt"
            )
        skip, self._at_prompt = self._at_prompt and self.skip_prompt, False
        if skip:
            return
        for token_id in ids.flatten().tolist():
            self._held.append(token_id)
            # tokenizers' DecodeStream is not used, because it can raise on invalid UTF-8.
            if len(self._held) >= MAX_HELD or not self._text().endswith("�"):
                self._flush()

    def end(self) -> None:
        """Writes the text of the remaining ids, even if the last character is incomplete. The next
        call of `put` passes a new prompt."""
        self._flush()
        self._at_prompt = True

    def _text(self) -> str:
        return self.tokenizer.decode(self._held, self.skip_special_tokens)

    def _flush(self) -> None:
        if text := self._text():
            self.write(text)
        self._held.clear()


class TextIteratorStreamer(TextStreamer):
    """Iterates over the pieces of text while another thread runs `generate`.

    Arguments and defaults are those of transformers: prompt and special tokens are included by
    default. Raises queue.Empty if no piece arrives for `timeout` seconds (None: wait forever).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_prompt: bool = False,
        timeout: float | None = None,
        *,
        skip_special_tokens: bool = False,
    ):
        self.timeout = timeout
        self._pieces: Queue[str | None] = Queue()
        super().__init__(
            tokenizer, self._pieces.put, skip_prompt=skip_prompt,
            skip_special_tokens=skip_special_tokens,
        )  # fmt: skip

    def end(self) -> None:
        super().end()
        self._pieces.put(None)

    def __iter__(self) -> "TextIteratorStreamer":
        return self

    def __next__(self) -> str:
        piece = self._pieces.get(timeout=self.timeout)
        if piece is None:
            raise StopIteration
        return piece


def _print(text: str) -> None:
    print(text, end="", file=sys.stdout, flush=True)
