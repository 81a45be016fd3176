"""The table of routes over one engine.

Knows HTTP and the engine's Python API. Knows no sockets or signals: `run` has those.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from kvrelay.engine import Engine
from kvrelay.errors import EngineClosed, KVRelayError
from kvrelay.router.request import Operation
from kvrelay.server.body import read_body
from kvrelay.server.errors import Refused, error_response
from kvrelay.server.gate import CARRIED, REQUEST_ID, Gate
from kvrelay.server.generation import ClientGone, EventBridge, Generation
from kvrelay.server.live import add_live_page
from kvrelay.server.openapi import Documents
from kvrelay.server.operations import add_operations
from kvrelay.server.plan import Plan, plan_chat, plan_completion
from kvrelay.server.requests import ChatRequest, CompletionRequest, Sampling, parse
from kvrelay.server.responses import ChatChunk, ChatCompletion, Completion
from kvrelay.server.service import Service
from kvrelay.server.streaming import Chunks, EventStream, beside_loop
from kvrelay.server.writers import ChatWriter, CompletionWriter, Head, Writer
from kvrelay.server_config import ServerConfig
from kvrelay.version import __version__

Body = TypeVar("Body", bound=Sampling)


class DirectRoute(APIRoute):
    """A route whose function is given the request as it is: FastAPI's injection costs as much as the rest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The function itself."""
        return self.endpoint


def create_app(engine: Engine, config: ServerConfig) -> FastAPI:
    """The ASGI application; the engine stays the caller's to close."""
    service = Service(engine, config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.bridge = EventBridge(engine, asyncio.get_running_loop())
        yield

    app = FastAPI(
        title="kvrelay",
        version=__version__,
        description="OpenAI-compatible inference with prefill and decode in separate processes.",
        docs_url=None,  # the pages would load their scripts from another host
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    documents = Documents()
    router = app.router  # not one that is included: routing would take twice as long
    _add_generation(router, service, documents)
    add_operations(router, service, documents)
    add_live_page(router, service, documents)
    documents.install(app, with_key=config.api_key is not None)
    for kind in (KVRelayError, Refused, HTTPException, ClientGone, Exception):
        app.add_exception_handler(kind, _on_error)
    app.add_middleware(Gate, config=config)
    return app


def _add_generation(router: APIRouter, service: Service, documents: Documents) -> None:
    async def completions(request: Request) -> Response:
        """Continue text or token ids."""
        asked = await _read(service, request, CompletionRequest)
        head = Head.new(f"cmpl-{request.scope[REQUEST_ID]}", service.model_name)
        plan = _named(request, head, "text_completion", await plan_completion(service.engine, asked))
        writer = CompletionWriter(plan, head, service.engine.tokenizer, asked.echo is True)
        return await _answer(service, request, asked, plan, writer)

    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        asked = await _read(service, request, ChatRequest)
        head = Head.new(f"chatcmpl-{request.scope[REQUEST_ID]}", service.model_name)
        plan = _named(request, head, "chat", await plan_chat(service.engine, asked))
        writer = ChatWriter(plan, head, service.engine.tokenizer)
        return await _answer(service, request, asked, plan, writer)

    for path, function, documented in (
        ("/v1/completions", completions, (Completion, CompletionRequest, Completion)),
        ("/v1/chat/completions", chat_completions, (ChatCompletion, ChatRequest, ChatChunk)),
    ):
        answer, body, chunk = documented
        keywords = documents.route(answer, body=body, chunk=chunk, runs_engine=True)
        router.add_api_route(path, function, methods=["POST"], route_class_override=DirectRoute, **keywords)


async def _read(service: Service, request: Request, kind: type[Body]) -> Body:
    """The document sent; the header `X-KVRelay: 1` asks for ledger and joules as the field `kvrelay` does."""
    asked = parse(await read_body(request, service), kind)
    service.check_model(asked.model)
    if request.headers.get("x-kvrelay", "").lower() in ("1", "true"):
        asked = msgspec.structs.replace(asked, kvrelay=True)
    return asked


def _named(request: Request, head: Head, operation: Operation, plan: Plan) -> Plan:
    """The plan, its requests known to the engine by the response's id and the caller's span."""
    trace = request.headers.get("traceparent")
    prepared = [replace(one, traceparent=trace, name=head.id, operation=operation) for one in plan.prepared]
    return replace(plan, prepared=prepared)


async def _answer(
    service: Service, request: Request, asked: Sampling, plan: Plan, writer: Writer
) -> Response:
    """Run the plan; a stream's headers wait for its first news, so that an early failure has its status."""
    if service.draining.is_set():
        raise EngineClosed("the server is shutting down")
    with_progress = asked.stream is True and plan.with_measured
    generation = Generation(
        service.bridge, plan.prepared, ends_only=not asked.stream, with_progress=with_progress
    )
    try:
        generation.watch(request.receive)
        if not asked.stream:
            outputs = await generation.outputs()
            generation.close()
            content = await beside_loop(plan.num_logprobs, lambda: msgspec.json.encode(writer.whole(outputs)))
            return Response(content, media_type="application/json")
        bursts = generation.bursts()
        first = await anext(bursts)
    except BaseException:  # cancelled too: nothing may go on for nobody
        generation.close()
        raise
    chunks = Chunks(plan, writer, asked.stream_options)
    return EventStream(chunks.pieces(first, bursts), generation.close)


async def _on_error(request: Request, error: Exception) -> Response:
    """The border: whatever went wrong is OpenAI's error object to the client; the log has what it was."""
    if isinstance(error, ClientGone):
        return Response(status_code=499)  # nobody reads it
    if isinstance(error, HTTPException):
        message = f"{request.method} {request.url.path}: {error.detail}"
        error = Refused(error.status_code, message, headers=error.headers)
    response = error_response(error)
    if not isinstance(error, KVRelayError | Refused):  # answered outside the gate, which marks all others
        response.raw_headers += [*request.scope[CARRIED], (b"connection", b"close")]  # as uvicorn will
    return response
