"""Runs an application in uvicorn until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from gemma_fast.server.engine import Engine

MORE_CONNECTIONS = 256  # besides one for each place: connections that are idle or refused

ERROR_SECONDS = 5  # in which requests that are ended after the drain get their error


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound and does not listen yet. Raises OSError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except OSError:
            found.close()
            raise
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return found


def serve_http(
    app: FastAPI, listener: socket.socket, drain: int, ready: Callable[[], None]
) -> None:
    """Serves until a signal. Then it accepts no more requests, and finishes those that run.

    drain  seconds after which requests that still run are ended
    ready  is called when the server accepts requests
    """
    places = app.state.service.engine.places
    server = _Server(
        uvicorn.Config(
            app, http="h11", ws="none", lifespan="on", log_level="warning", access_log=False,
            proxy_headers=False, server_header=False, limit_concurrency=places + MORE_CONNECTIONS,
            timeout_graceful_shutdown=drain + ERROR_SECONDS,
        )
    )  # fmt: skip
    server.ready, server.drain, server.engine = ready, drain, app.state.service.engine
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises the signal again at its end, for this handler.
        signal.signal(number, server.handle_exit)
    server.run([listener])


class _Server(uvicorn.Server):
    ready: Callable[[], None]
    drain: int
    engine: Engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self.drain, self.engine.stop)
        await super().shutdown(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.ready()
