"""`Limits` of one request, and `Guard`, which refuses requests before their body is parsed."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Collection
from typing import Any, NamedTuple

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemma_fast.server.errors import ApiError
from gemma_fast.server.metrics import Metrics

OPEN_PATHS = ("/health",)  # need no key


class Limits(NamedTuple):
    """body_bytes     of a request's body
    bodies_bytes   of the bodies of all requests that have not ended
    prompt_tokens  None: as many as fit the engine's max_length
    new_tokens     of a text; None: as many as fit
    seconds        after which a text ends, waiting included
    body_seconds   for a client to send the body
    send_seconds   for a client to read the rest of an answer that has ended
    """

    body_bytes: int = 4 << 20
    bodies_bytes: int = 256 << 20
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    seconds: float = 600.0
    body_seconds: float = 60.0
    send_seconds: float = 60.0


class Guard:
    """ASGI middleware. Checks host, key and content type, reads the body up to its limit, and ends
    a request that takes too long.

    keys   one of them must be in the header Authorization; empty: no key is needed
    hosts  names that the header Host may have; None: all. Without a key it keeps web pages that a
           local browser shows from reading the server by DNS rebinding
    paths  labels of the metric `responses`
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, metrics: Metrics, keys: Collection[str] = (),
        hosts: Collection[str] | None = None, paths: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.app, self.limits, self.metrics = app, limits, metrics
        self.keys, self.hosts, self.paths = [key.encode() for key in keys], hosts, paths
        self._held = 0  # bytes of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, body = False, bytearray()

        async def count_and_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._count(scope, message["status"])
            await send(message)

        limits = self.limits
        seconds = limits.seconds + limits.body_seconds + limits.send_seconds
        try:
            self._check(scope)
            receive = await self._read(scope, receive, body)
            await asyncio.wait_for(self.app(scope, receive, count_and_send), seconds)
        except ApiError as error:
            await error.response(self._headers(error))(scope, receive, count_and_send)
        except asyncio.TimeoutError:
            if started:
                raise
            await ApiError(408, "the request took too long").response()(
                scope, receive, count_and_send
            )
        except Exception:  # the caller logs and answers it
            if not started:
                self._count(scope, 500)
            raise
        finally:
            self._held -= len(body)

    def _count(self, scope: Scope, status: int) -> None:
        path = scope["path"] if scope["path"] in self.paths else "other"
        self.metrics.responses.labels(path, status).inc()

    def _headers(self, error: ApiError) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self.hosts is not None:
            host = headers.get("host", "")
            name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
            if name.lower() not in self.hosts:
                raise ApiError(403, f"the host {name!r:.60} is not that of this server")
        if scope["path"] not in OPEN_PATHS and not self._allows(headers.get("authorization", "")):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        # A web page can send other types to a local server without asking it first (CORS).
        if scope["method"] == "POST" and kind != "application/json":
            raise ApiError(415, f"Content-Type must be application/json, not {kind!r:.60}")

    def _allows(self, authorization: str) -> bool:
        if not self.keys:
            return True
        scheme, _, given = authorization.partition(" ")
        key = given.strip(" ").encode("latin-1")  # the bytes that were sent
        found = [hmac.compare_digest(key, known) for known in self.keys]
        return scheme.lower() == "bearer" and any(found)

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> Receive:
        """Reads the request into `body`. Returns a function that gives it to the application, and
        then waits until the client goes away."""
        most = self.limits.body_bytes
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > most:
            raise self._too_large()
        try:
            await asyncio.wait_for(self._fill(body, receive), self.limits.body_seconds)
        except asyncio.TimeoutError:
            raise ApiError(408, "the body did not arrive in time") from None
        messages: list[dict[str, Any]] = [
            {"type": "http.request", "body": bytes(body), "more_body": False}
        ]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        return replay

    async def _fill(self, body: bytearray, receive: Receive) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the client went away")
            part = message.get("body", b"")
            body += part
            self._held += len(part)
            if self._held > self.limits.bodies_bytes:
                raise ApiError(503, "the bodies of all requests are too large: try later")
            if len(body) > self.limits.body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self.limits.body_bytes} bytes")
