"""`AnswerText` separates an answer, token by token, into text, thoughts and tool calls. It cuts the
text before a stop string."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch

from gemma_fast.text.streaming import ChatStreamer, TextStreamer
from gemma_fast.text.tokenizer import Tokenizer
from gemma_fast.text.tool_calls import CALL, END_CALL, ToolCall, read_tool_call


class Piece(NamedTuple):
    """A part of an answer. call  of kind "call" only"""

    kind: Literal["text", "thought", "call"]
    text: str
    call: ToolCall | None = None


class AnswerText:
    """Separates one answer.

    prompt        ids of the prompt, which may begin the thoughts of a Gemma 4
    stop_strings  the text ends before the first of them
    chat          True: thoughts are not part of the text
    calls         True: a tool call is a piece of its own. A call without the format of text/
                  tool_calls.py, and every call of a vocabulary before Gemma 4, is text

    All pieces are without special tokens. `stopped` is True after a stop string.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], *, stop_strings: Sequence[str] = (),
        chat: bool = False, calls: bool = False,
    ) -> None:  # fmt: skip
        self.stopped = False
        self._pieces: list[Piece] = []
        self._stops = {kind: StopStrings(stop_strings) for kind in ("text", "thought")}
        self._streamer: TextStreamer
        if calls:
            self._streamer = _CallStreamer(tokenizer, self._write_call, self._think, self._write)
        elif chat:
            self._streamer = ChatStreamer(tokenizer, self._think, write=self._write)
        else:
            self._streamer = TextStreamer(
                tokenizer, skip_prompt=True, skip_special_tokens=True, write=self._write
            )
        self._streamer.put(torch.tensor([*prompt], dtype=torch.int64))

    def add(self, ids: Iterable[int]) -> list[Piece]:
        """Returns the pieces that these tokens complete. Text that may be the beginning of a stop
        string waits for the next tokens."""
        self._streamer.put(torch.tensor([*ids], dtype=torch.int64))
        return self._take()

    def end(self) -> list[Piece]:
        """Returns the remaining pieces, after the last token."""
        self._streamer.end()
        for kind, stops in self._stops.items():
            self._append(kind, stops.end())
        return self._take()

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _write(self, text: str) -> None:
        self._filter("text", text)

    def _think(self, text: str) -> None:
        self._filter("thought", text)

    def _filter(self, kind: str, text: str) -> None:
        if not self.stopped:
            stops = self._stops[kind]
            self._append(kind, stops.add(text))
            self.stopped = stops.stopped

    def _write_call(self, call: ToolCall) -> None:
        if not self.stopped:
            self._pieces.append(Piece("call", "", call))

    def _append(self, kind: str, text: str) -> None:
        if text:
            self._pieces.append(Piece(kind, text))  # type: ignore[arg-type]


class StopStrings:
    """Passes a text on, piece by piece, up to the first stop string. `stopped` is True after it."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self.stopped = False
        self._stops = [*stop_strings]
        self._longest = max(map(len, stop_strings), default=0)
        self._held = ""

    def add(self, text: str) -> str:
        """Returns the text that is known to be before a stop string."""
        text, self._held = self._held + text, ""
        starts = [at for at in map(text.find, self._stops) if at >= 0]
        if starts:
            self.stopped = True
            return text[: min(starts)]
        for length in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                self._held = text[-length:]
                return text[:-length]
        return text

    def end(self) -> str:
        """Returns the text that was held back."""
        text, self._held = self._held, ""
        return text


class _CallStreamer(ChatStreamer):
    """Writes complete tool calls to `write_call`."""

    def __init__(
        self, tokenizer: Tokenizer, write_call: Callable[[ToolCall], object],
        write_thought: Callable[[str], object], write: Callable[[str], object],
    ) -> None:  # fmt: skip
        super().__init__(tokenizer, write_thought, write=write)
        self._write_call = write_call
        self._marks = tokenizer.token_to_id(CALL), tokenizer.token_to_id(END_CALL)
        self._call: list[int] | None = None  # tokens of a call that has not ended

    def end(self) -> None:
        self._end_call()
        super().end()

    def _take(self, token_id: int) -> None:
        start, stop = self._marks
        if token_id == start and self._call is None:
            self._flush()
            self._call = []
        elif self._call is None:
            super()._take(token_id)
        elif token_id == stop:
            self._end_call()
        else:
            self._call.append(token_id)

    def _end_call(self) -> None:
        ids, self._call = self._call, None
        if ids is None:
            return
        call = read_tool_call(self.tokenizer.decode(ids))
        if call is not None:
            self._write_call(call)
            return
        for token_id in ids:
            super()._take(token_id)
