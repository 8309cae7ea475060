"""`Choice` turns the events of a text into what clients see of it: OpenAI calls a text a choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gemma_fast.engine.logprobs import TokenLogprobs
from gemma_fast.engine.request import Request
from gemma_fast.server.ticket import Event
from gemma_fast.text.answer import AnswerText, Piece
from gemma_fast.text.tokenizer import Tokenizer
from gemma_fast.text.tool_calls import ToolCall

# Why a text ended → OpenAI's finish_reason.
FINISH = {"stop": "stop", "length": "length", "time": "length"}


class Delta(NamedTuple):
    """A part of a choice, or a whole one.

    called    number of calls before `calls`
    first     True for the first part of a choice
    logprobs  ids and log-probabilities of new tokens; those of thoughts and of the end included
    finish    finish_reason in the last part, else None
    """

    number: int
    text: str = ""
    thought: str = ""
    calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[tuple[int, TokenLogprobs], ...] = ()
    finish: str | None = None
    called: int = 0
    first: bool = False

    def __bool__(self) -> bool:
        return bool(self.text or self.thought or self.calls or self.logprobs or self.finish)

    def __add__(self, other: Delta) -> Delta:  # type: ignore[override]
        """Returns both parts as one."""
        return self._replace(
            text=self.text + other.text, thought=self.thought + other.thought,
            calls=self.calls + other.calls, logprobs=self.logprobs + other.logprobs,
            finish=other.finish or self.finish,
        )  # fmt: skip


class Choice:
    """A text of an answer.

    tokens       number of new tokens
    finished     True after the last part
    chat, calls  see AnswerText
    """

    def __init__(
        self, number: int, request: Request, tokenizer: Tokenizer, *, chat: bool, calls: bool
    ) -> None:
        self.number, self.tokens, self.finished = number, 0, False
        prompt = request.ids.tolist() if chat else ()
        self._answer = AnswerText(
            tokenizer, prompt, stop_strings=request.stop_strings, chat=chat, calls=calls
        )
        self._called = 0
        self._first = True

    def take(self, event: Event) -> Delta:
        """Returns the part that an event adds."""
        if self.finished:
            return Delta(self.number)
        self.tokens += len(event.ids)
        pieces = self._answer.add(event.ids)
        finish = "stop" if self._answer.stopped else FINISH.get(event.reason or "")
        if finish:
            pieces += self._answer.end()
            self.finished = True
        return self._delta(pieces, event, finish)

    def _delta(self, pieces: Sequence[Piece], event: Event, finish: str | None) -> Delta:
        calls = tuple(piece.call for piece in pieces if piece.call is not None)
        if finish == "stop" and (calls or self._called):
            finish = "tool_calls"
        delta = Delta(
            self.number,
            text="".join(piece.text for piece in pieces if piece.kind == "text"),
            thought="".join(piece.text for piece in pieces if piece.kind == "thought"),
            calls=calls, finish=finish, called=self._called,
            logprobs=tuple(zip(event.ids, event.logprobs, strict=True)) if event.logprobs else (),
        )  # fmt: skip
        if delta:
            delta = delta._replace(first=self._first)
            self._first = False
        self._called += len(calls)
        return delta
