"""Bodies of requests. A body has fields that are applied, which are those of the classes, and
OpenAI's other fields, which a table accepts if they change nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from gemma_fast.compat import ANY, Table, check_keywords
from gemma_fast.engine.many import MAX_LOGPROBS
from gemma_fast.server.errors import BadRequest

MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_BIASES, MAX_BIAS = 1024, 1e6  # larger ones overflow at a low temperature
MAX_VALUES = 1 << 18  # log-probabilities of all texts of a request: 100 MB while they are written
MAX_TEXTS = 128  # n
MAX_PROMPTS, MAX_MESSAGES, MAX_TOOLS = 4096, 10_000, 1024  # more take seconds to read
MAX_FIELDS = 16  # of a field that is an object with known names
LEAST_PENALTY = 0.01  # repetition_penalty; below, logits overflow
Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_LENGTH)]
# fail_fast: a list of a million bad items gives one error, not a million.
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)]
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
Ids = Annotated[list[int], Field(fail_fast=True)]
_PENALTY = "use repetition_penalty, which counts prompt and text"


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, given: Any) -> Any:
        """Pydantic lists an error for each unknown field."""
        if isinstance(given, dict) and len(given) > MAX_FIELDS:
            raise ValueError(f"{len(given)} fields, but the known ones are {[*cls.model_fields]}")
        return given


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # no effect


class ResponseFormat(_Strict):
    type: Literal["text"]


class TemplateOptions(_Strict):
    enable_thinking: bool | None = None


class Body(BaseModel, ABC):
    """Fields of both endpoints. None: the default. top_k, min_p and repetition_penalty are not
    OpenAI's, see `engine.sampling.Sampling`."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    accepted: ClassVar[Table] = {
        "user": (ANY, ""), "metadata": (ANY, ""), "store": (ANY, ""), "service_tier": (ANY, ""),
        "safety_identifier": (ANY, ""), "prompt_cache_key": (ANY, ""),
        "prompt_cache_retention": (ANY, ""),
        "frequency_penalty": ((0,), _PENALTY), "presence_penalty": ((0,), _PENALTY),
    }  # fmt: skip

    model: str | None = None
    n: int | None = Field(None, ge=1, le=MAX_TEXTS)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=LEAST_PENALTY)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    stop: Stops | None = None
    logit_bias: dict[str, Bias] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _list_of_stops(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _few_biases(cls, given: Any) -> Any:
        if isinstance(given, dict) and len(given) > MAX_BIASES:
            raise ValueError(f"{len(given)} biases are above the limit of {MAX_BIASES}")
        return given

    @property
    def texts(self) -> int:
        """Number of texts for each prompt."""
        return self.n or 1

    @property
    def all_texts(self) -> int:
        """Number of texts."""
        return self.texts

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens

    @property
    @abstractmethod
    def top(self) -> int | None:
        """Number of likeliest tokens whose log-probabilities are returned with each new token;
        None: no log-probabilities."""


class CompletionBody(Body):
    """Body of /v1/completions. prompt is one text or several, or token ids."""

    accepted = {
        **Body.accepted,
        "echo": ((False,), "prepend the prompt to the answer"),
        "suffix": (("",), "Gemma continues a prompt only"),
    }
    prompt: Annotated[list[str | Ids], Field(min_length=1, fail_fast=True)]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _list_of_prompts(cls, given: Any) -> Any:
        ids = isinstance(given, list) and given and isinstance(given[0], int)
        if isinstance(given, list) and len(given) > MAX_PROMPTS and not ids:
            raise ValueError(f"{len(given)} prompts are above the limit of {MAX_PROMPTS}")
        return [given] if isinstance(given, str) or ids else given

    @field_validator("best_of")
    @classmethod
    def _only_n(cls, given: int | None, info: Any) -> int | None:
        if given is not None and given != (info.data.get("n") or 1):
            raise ValueError("best_of must equal n: all texts are returned")
        return given

    @property
    def all_texts(self) -> int:
        return self.texts * len(self.prompt)

    @property
    def top(self) -> int | None:
        return self.logprobs


class ChatBody(Body):
    """Body of /v1/chat/completions. `gemma_fast.text.chat` checks messages and tools."""

    accepted = {
        **Body.accepted,
        "prediction": (ANY, ""), "verbosity": (("medium",), "ask for it in a message"),
        "parallel_tool_calls": ((True,), "the model may call several tools"),
        "functions": ((), "use tools"), "function_call": ((), "use tool_choice"),
        "audio": ((), "answers are text"), "web_search_options": ((), "pass a tool"),
        "reasoning_effort": ((), 'use chat_template_kwargs={"enable_thinking": true}'),
    }  # fmt: skip
    messages: Annotated[
        list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Any] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto"] | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    chat_template_kwargs: TemplateOptions | None = None

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered(self) -> list[Any] | None:
        """The tools that the model may call."""
        return None if self.tool_choice == "none" else self.tools or None


AnyBody = TypeVar("AnyBody", bound=Body)


def read_body(kind: type[AnyBody], content: bytes) -> AnyBody:
    """Returns the body. Raises BadRequest, which names the field and its value."""
    try:
        body = kind.model_validate_json(content)
    except ValidationError as error:
        raise _bad_request(error) from None
    known: Table = {**dict.fromkeys(kind.model_fields, (ANY, "")), **kind.accepted}
    for name, value in (body.model_extra or {}).items():
        try:
            check_keywords("the request", {name: value}, known)
        except TypeError as error:
            raise BadRequest(str(error), f"{name:.60}") from None
    if isinstance(body, ChatBody) and body.top_logprobs is not None and not body.logprobs:
        raise BadRequest("top_logprobs needs logprobs=true", "top_logprobs")
    return body


def _bad_request(error: ValidationError) -> BadRequest:
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return BadRequest(
            f"the body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}"
        )
    path = [str(part) for part in first["loc"]]
    where = f"{'.'.join(path):.100}"
    if first["type"] == "missing":
        return BadRequest(f"{where} is missing", path[0])
    value = f"{where}={first['input']!r:.60}" if where else "the body"
    return BadRequest(f"{value}: {first['msg']}", path[0] if path else None)
