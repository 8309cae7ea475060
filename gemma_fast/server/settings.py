"""`Settings` of a server, which the command line and Ray Serve share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import Self  # in typing from Python 3.11 on

from gemma_fast.causal_lm import DEFAULT_LENGTH, GemmaForCausalLM
from gemma_fast.engine.scheduler import CHUNK
from gemma_fast.server.app import create_app
from gemma_fast.server.engine import Engine
from gemma_fast.server.limits import Limits
from gemma_fast.text.chat_prefix import chat_prefix
from gemma_fast.text.tokenizer import Tokenizer

PREFIX, KEY = "GEMMA_FAST_", "GEMMA_FAST_API_KEY"
LOCAL = ("127.0.0.1", "localhost", "[::1]")


class Settings(BaseModel):
    """model            directory, .gguf file or hub id; None: the demo weights
    served_name      the model's name for clients; None: the last part of its path, or the hub id
    api_key_file     file with an API key in each line; None: the environment variable KEY, if set
    system_file      text of a system message; its tokens are computed once, and copied to the chats
                     that begin with it
    batch_size, max_length, queue, chunk, batch_invariant  see Engine
    max_new_tokens, max_time  see Limits
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    device: str | None = None
    dtype: str = "auto"
    quantize: str | None = None
    served_name: str | None = None
    api_key_file: str | None = None
    system_file: str | None = None
    batch_size: int = Field(32, ge=1)
    max_length: int = Field(DEFAULT_LENGTH, ge=2)
    queue: int = Field(256, ge=0)
    chunk: int = Field(CHUNK, ge=1)
    batch_invariant: bool = False
    max_new_tokens: int | None = Field(None, ge=1)
    max_time: float = Field(600.0, gt=0)

    @classmethod
    def from_environment(cls, **more: Any) -> Self:
        """Returns the settings in environment variables: GEMMA_FAST_MODEL, and so on."""
        names = {name: PREFIX + name.upper() for name in cls.model_fields}
        found: dict[str, Any] = {k: os.environ[v] for k, v in names.items() if v in os.environ}
        return cls(**{**found, **more})

    def keys(self) -> list[str]:
        """Returns the API keys. Raises ValueError if the file or the variable has none."""
        if self.api_key_file is None:
            key = os.environ.get(KEY)
            if key is not None and not key.strip():
                raise ValueError(f"{KEY} is empty: set it to an API key, or unset it")
            return [] if key is None else [key.strip()]
        text = Path(self.api_key_file).read_text(encoding="utf-8-sig")
        keys = [line.strip() for line in text.splitlines() if line.strip()]
        if not keys:
            raise ValueError(f"{self.api_key_file} is empty: write an API key in each line")
        return keys

    def name(self) -> str:
        """Returns the model's name for clients."""
        if self.served_name is not None:
            return self.served_name
        if self.model is None:
            return "demo"
        path = Path(self.model)
        return path.resolve().name.removesuffix(".gguf") if path.exists() else self.model

    def app(self, model: GemmaForCausalLM, tokenizer: Tokenizer, *, local: bool = False) -> FastAPI:
        """Returns the application. local  it is reached as localhost only"""
        prefix: list[int] = []
        if self.system_file is not None:
            system = Path(self.system_file).read_text(encoding="utf-8")
            prefix = chat_prefix(tokenizer, system)
        engine = Engine(
            model, tokenizer, batch_size=self.batch_size, max_length=self.max_length,
            queue=self.queue, chunk=self.chunk, invariant=self.batch_invariant,
            prefix=prefix,
        )  # fmt: skip
        limits = Limits(new_tokens=self.max_new_tokens, seconds=self.max_time)
        keys = self.keys()
        hosts = LOCAL if local and not keys else None
        return create_app(engine, self.name(), keys=keys, limits=limits, hosts=hosts)
