"""Streams text: receives token ids, and writes each character as soon as it is complete.

A Gemma 4 writes its thoughts in front of an answer, and ChatStreamer separates the two:

    <|channel>thought\n{thoughts}<channel|>{answer}<turn|>
"""

import sys
from collections.abc import Callable, Iterable
from queue import Queue
from typing import Any

import torch
from torch import Tensor

from gemma_fast.compat import check_keywords
from gemma_fast.text.chat import CLOSE, OPEN
from gemma_fast.text.keywords import DECODE
from gemma_fast.text.tokenizer import Tokenizer

MAX_HELD = 16  # ids that may wait for a complete character, which has at most four bytes


class TextStreamer:
    """Writes text during `generate`, which passes the prompt, then each new token, to `put`.

    Arguments and defaults are those of transformers: prompt and special tokens are included by
    default, and a newline is printed at the end.

    `on_finalized_text`, which a subclass may override, receives pieces of text that do not end
    inside a character. Joined, they equal `tokenizer.decode` of the same ids, unless the bytes are
    not valid UTF-8.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_prompt: bool = False,
        *,
        skip_special_tokens: bool = False,
        write: Callable[[str], object] | None = None,
        **decode_kwargs: Any,
    ):
        """write          receives each piece of text that is not empty; default: prints it at once
        decode_kwargs  keywords of `tokenizer.decode`, which have no effect here
        """
        check_keywords("the streamer", decode_kwargs, DECODE)
        self.tokenizer, self.write = tokenizer, write
        self.skip_prompt, self.skip_special_tokens = skip_prompt, skip_special_tokens
        self._held: list[int] = []
        self._at_prompt = True

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Writes a piece of text. The last call, with stream_end=True, may have no text."""
        if self.write is None:
            print(text, end="\n" if stream_end else "", file=sys.stdout, flush=True)
        elif text:
            self.write(text)

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
            self._take(token_id)

    def end(self) -> None:
        """Writes the text of the remaining ids, even if the last character is incomplete. The next
        call of `put` passes a new prompt."""
        text = self._text()
        self._held.clear()
        self._at_prompt = True
        self.on_finalized_text(text, stream_end=True)

    def _take(self, token_id: int) -> None:
        self._held.append(token_id)
        # tokenizers' DecodeStream is not used, because it can raise on invalid UTF-8.
        if len(self._held) >= MAX_HELD or not self._text().endswith("�"):
            self._flush()

    def _text(self) -> str:
        return self.tokenizer.decode(self._held, self.skip_special_tokens)

    def _flush(self) -> None:
        text = self._text()
        self._held.clear()
        if text:
            self.on_finalized_text(text)


class ChatStreamer(TextStreamer):
    """Writes an answer without prompt, special tokens and thoughts. `write_thought` receives the
    pieces of thoughts, without the name of their channel, which is their first line."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        write_thought: Callable[[str], object],
        *,
        write: Callable[[str], object] | None = None,
    ):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, write=write)
        self.write_thought = write_thought
        # A vocabulary before Gemma 4 has neither token.
        self._open, self._close = tokenizer.token_to_id(OPEN), tokenizer.token_to_id(CLOSE)
        self._thinking = self._in_name = False

    def put(self, ids: Tensor) -> None:
        if self._at_prompt:
            prompt = ids.flatten().tolist()
            marks = [i for i, token in enumerate(prompt) if token in (self._open, self._close)]
            tail = prompt[marks[-1] :] if marks else []
            self._thinking = tail[:1] == [self._open]
            self._in_name = self._thinking and "\n" not in self.tokenizer.decode(tail)
        super().put(ids)

    def _take(self, token_id: int) -> None:
        if token_id in (self._open, self._close):
            self._flush()
            self._thinking = self._in_name = token_id == self._open
        else:
            super()._take(token_id)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._thinking:
            if self._in_name:
                _, newline, text = text.partition("\n")
                self._in_name = not newline
            if text:
                self.write_thought(text)
            text = ""
        super().on_finalized_text(text, stream_end)


def split_thoughts(
    tokenizer: Tokenizer, ids: Iterable[int], prompt: Iterable[int] = ()
) -> tuple[str, str]:
    """Returns the thoughts in `ids`, the tokens of one answer, and the answer without them. Both
    are without special tokens. A prompt may start the thoughts."""
    thoughts: list[str] = []
    answer: list[str] = []
    streamer = ChatStreamer(tokenizer, thoughts.append, write=answer.append)
    streamer.put(torch.tensor([*prompt], dtype=torch.int64))
    streamer.put(torch.tensor([*ids], dtype=torch.int64))
    streamer.end()
    return "".join(thoughts), "".join(answer)


class TextIteratorStreamer(TextStreamer):
    """Iterates over the pieces of text while another thread runs `generate`.

    Raises queue.Empty if no piece arrives for `timeout` seconds (None: wait forever).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_prompt: bool = False,
        timeout: float | None = None,
        **options: Any,
    ):
        """options  keywords of TextStreamer"""
        super().__init__(tokenizer, skip_prompt, **options)
        self.timeout = timeout
        self._pieces: Queue[str | None] = Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._pieces.put(text)
        if stream_end:
            self._pieces.put(None)

    def __iter__(self) -> "TextIteratorStreamer":
        return self

    def __next__(self) -> str:
        piece = self._pieces.get(timeout=self.timeout)
        if piece is None:
            raise StopIteration
        return piece
