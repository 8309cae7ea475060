"""`create_app` returns the HTTP application: OpenAI's endpoints, /health and /metrics."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from gemma_fast.server.answers import Chat, Completion
from gemma_fast.server.engine import Engine
from gemma_fast.server.errors import INTERNAL, ApiError
from gemma_fast.server.job import Job
from gemma_fast.server.limits import Guard, Limits
from gemma_fast.server.prompts import chat_requests, completion_requests
from gemma_fast.server.reply import Reply
from gemma_fast.server.schema import Body, ChatBody, CompletionBody, read_body

log = logging.getLogger(__name__)
PROMPT_THREADS = 4  # which render and encode prompts
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")
router = APIRouter()
T = TypeVar("T")


class Service:
    """State of an application. name  of the model in answers"""

    def __init__(self, engine: Engine, name: str, limits: Limits) -> None:
        self.engine, self.name, self.limits = engine, name, limits
        self.created = int(time.time())
        self.pool = ThreadPoolExecutor(PROMPT_THREADS, thread_name_prefix="gemma_fast prompts")

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            message = f"the model {name!r:.60} does not exist: this server has {self.name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    async def prepare(self, function: Callable[..., T], body: Body) -> T:
        """Runs a function of prompts.py in the pool."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.pool, function, self.engine, self.limits, body)

    @property
    def model(self) -> dict[str, Any]:
        return {
            "id": self.name, "object": "model", "created": self.created, "owned_by": "gemma_fast",
            "max_model_len": self.engine.max_length,
        }  # fmt: skip


def create_app(
    engine: Engine, name: str, *, keys: Collection[str] = (), limits: Limits | None = None,
    hosts: Collection[str] | None = None,
) -> FastAPI:  # fmt: skip
    """Returns the application. It starts and closes the engine.

    name    of the model, as clients send it
    keys    API keys, one of which all endpoints but /health need; empty: no key is needed
    limits  None: the default limits
    hosts   names that the header Host may have; None: all
    """
    limits = limits or Limits()
    service = Service(engine, name, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)
        service.pool.shutdown(cancel_futures=True)

    app = FastAPI(
        lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None,
        redirect_slashes=False,  # the address would have the host that the client names
    )  # fmt: skip
    app.state.service = service
    app.include_router(router)
    app.add_middleware(
        Guard, limits=limits, metrics=engine.metrics, keys=keys, hosts=hosts, paths=PATHS
    )
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)
    return app


async def _service(request: Request) -> Service:
    return request.app.state.service


async def _job(request: Request) -> AsyncIterator[Job]:
    """Closes the job after the response, also if the client went away before its start."""
    job = Job(request.app.state.service.engine)
    try:
        yield job
    finally:
        job.close()


WithService = Annotated[Service, Depends(_service)]
WithJob = Annotated[Job, Depends(_job)]


@router.get("/health")
async def health(service: WithService) -> Response:
    if service.engine.failure is not None:
        raise ApiError(503, "the engine has failed: the server must be restarted")
    return JSONResponse({"status": "ok"})


@router.get("/metrics")
async def metrics(service: WithService) -> Response:
    return Response(service.engine.metrics.page(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models")
async def models(service: WithService) -> Response:
    return JSONResponse({"object": "list", "data": [service.model]})


@router.get("/v1/models/{name:path}")
async def model(name: str, service: WithService) -> Response:
    service.check_model(name)
    return JSONResponse(service.model)


@router.post("/v1/completions")
async def completions(request: Request, service: WithService, job: WithJob) -> Response:
    body = read_body(CompletionBody, await request.body())
    service.check_model(body.model)
    job.take(body.all_texts)
    requests = await _unless_gone(request, service.prepare(completion_requests, body))
    tokenizer = service.engine.tokenizer
    answers = Completion(service.name, tokenizer)
    return await _send(request, body, Reply(job, requests, answers, tokenizer, texts=body.texts))


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, service: WithService, job: WithJob) -> Response:
    body = read_body(ChatBody, await request.body())
    service.check_model(body.model)
    job.take(body.all_texts)
    requests = await _unless_gone(request, service.prepare(chat_requests, body))
    tokenizer = service.engine.tokenizer
    answers, calls = Chat(service.name, tokenizer), body.offered is not None
    reply = Reply(job, requests, answers, tokenizer, texts=body.texts, chat=True, calls=calls)
    return await _send(request, body, reply)


async def _send(request: Request, body: Body, reply: Reply) -> Response:
    if not body.stream:
        content = await _unless_gone(request, reply.whole())
        return await asyncio.to_thread(JSONResponse, content)
    options = body.stream_options
    usage = options is not None and bool(options.include_usage)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # not held by a proxy
    return StreamingResponse(reply.stream(usage), 200, headers, "text/event-stream")


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Waits for the result of `work`. Cancels it if the client goes away."""
    gone = asyncio.ensure_future(_wait_until_gone(request))
    result = asyncio.ensure_future(work)
    try:
        await asyncio.wait((result, gone), return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ApiError(400, "the client went away")
        return await result
    finally:
        gone.cancel()
        result.cancel()


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _api_error(_: Request, error: Any) -> Response:
    return error.response()


async def _http_error(request: Request, error: Any) -> Response:
    """Errors of the router: unknown paths and methods."""
    where = f"{request.method} {request.url.path!r:.100}"
    return ApiError(error.status_code, f"{where}: {error.detail}").response(error.headers)


async def _internal_error(_: Request, error: Exception) -> Response:
    return ApiError(500, INTERNAL).response()
