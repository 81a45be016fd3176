"""The routes beside generation: what is served, whether it is well, what it has measured, tokens and text."""

import asyncio
from contextlib import nullcontext

import msgspec
from fastapi import APIRouter, Request, Response

from kvrelay.errors import InvalidRequest, KVRelayError
from kvrelay.metrics import CONTENT_TYPE, Report
from kvrelay.server.body import read_body
from kvrelay.server.logprobs import spelled
from kvrelay.server.openapi import Documents
from kvrelay.server.plan import encode, naming_messages, render
from kvrelay.server.requests import (
    DetokenizeRequest,
    RoleRequest,
    TokenizeDocument,
    TokenizeRequest,
    parse,
)
from kvrelay.server.responses import (
    Detokenized,
    ErrorResponse,
    Health,
    ModelCard,
    ModelList,
    RoleChanged,
    Tokenized,
    Version,
    WorkerList,
)
from kvrelay.server.service import Service
from kvrelay.version import __version__


def add_operations(router: APIRouter, service: Service, documents: Documents) -> None:
    """Add the routes to `router`."""
    _add_state(router, service, documents)
    _add_roles(router, service, documents)
    _add_models(router, service, documents)
    _add_tokens(router, service, documents)


def _add_state(router: APIRouter, service: Service, documents: Documents) -> None:
    @router.get("/health", **documents.route(Health))
    async def health() -> Response:
        """Whether the process answers. Needs no key."""
        return _json(Health(status="ok"))

    @router.get("/ready", **documents.route(Health, also={503: Health}))
    async def ready() -> Response:
        """Whether a request would be served: workers of both roles are alive, and no stop has been asked."""
        reason = await _why_not_ready(service)
        return _json(Health(status="not ready" if reason else "ok", reason=reason), 503 if reason else 200)

    @router.get("/version", **documents.route(Version))
    async def version() -> Response:
        """Our version."""
        return _json(Version(version=__version__))

    @router.head("/metrics", include_in_schema=False)
    @router.get("/metrics", **documents.text(CONTENT_TYPE))
    async def metrics() -> Response:
        """Prometheus' text; docs/metrics.md has the catalogue."""
        text = await asyncio.to_thread(service.engine.metrics)
        return Response(text, headers={"content-type": CONTENT_TYPE})

    @router.get("/v1/kvrelay/report", **documents.route(Report, runs_engine=True))
    async def report() -> Response:
        """Tokens/s and tokens/joule per phase and per worker, so far."""
        return _json(await asyncio.to_thread(service.engine.report))

    @router.get("/v1/kvrelay/workers", **documents.route(WorkerList, runs_engine=True))
    async def workers() -> Response:
        """The workers: roles, pools, tokens, joules."""
        return _json(WorkerList(workers=(await asyncio.to_thread(service.engine.report)).workers))


def _add_roles(router: APIRouter, service: Service, documents: Documents) -> None:
    @router.post(
        "/v1/kvrelay/workers/{worker_id}/role",
        **documents.route(RoleChanged, body=RoleRequest, runs_engine=True),
    )
    async def role(worker_id: str, request: Request) -> Response:
        """Change what a worker does: drained, switched, verified by a real request, or rolled back."""
        asked = parse(await read_body(request, service), RoleRequest)
        change = asyncio.wrap_future(service.engine.set_role(worker_id, asked.role))
        epoch = await asyncio.shield(change)  # a client that leaves does not leave it half done
        return _json(RoleChanged(worker_id=worker_id, role=asked.role, epoch=epoch))


def _add_models(router: APIRouter, service: Service, documents: Documents) -> None:
    @router.get("/v1/models", **documents.route(ModelList))
    async def models() -> Response:
        """The model that is served."""
        return _json(ModelList(data=[_card(service)]))

    @router.get("/v1/models/{model:path}", **documents.route(ModelCard, also={404: ErrorResponse}))
    async def model(model: str) -> Response:
        """One model by name."""
        service.check_model(model)
        return _json(_card(service))


def _add_tokens(router: APIRouter, service: Service, documents: Documents) -> None:
    @router.post("/tokenize", **documents.route(Tokenized, body=TokenizeDocument))
    async def tokenize(request: Request) -> Response:
        """The tokens of a text or of a conversation."""
        asked = parse(await read_body(request, service), TokenizeRequest)
        service.check_model(asked.model)
        return _json(await _tokenize(service, asked))

    @router.post("/detokenize", **documents.route(Detokenized, body=DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        """The text of tokens, special ones left out."""
        asked = parse(await read_body(request, service), DetokenizeRequest)
        service.check_model(asked.model)
        size, longest = service.engine.spec.vocab_size, service.engine.max_model_len
        if len(asked.tokens) > longest:
            raise InvalidRequest(f"tokens: {len(asked.tokens)} of them; at most max_model_len={longest}")
        wrong = next((token for token in asked.tokens if token >= size), None)
        if wrong is not None:
            raise InvalidRequest(f"tokens: token id {wrong} is not in 0 to {size - 1}")
        return _json(Detokenized(prompt=service.engine.tokenizer.decode(asked.tokens)))


async def _tokenize(service: Service, asked: TokenizeRequest) -> Tokenized:
    engine = service.engine
    if (asked.prompt is None) == (asked.messages is None):
        raise InvalidRequest("prompt: exactly one of prompt and messages is needed")
    if asked.messages is not None:
        generation = asked.add_generation_prompt is not False
        text = render(engine, asked.messages, add_generation_prompt=generation)
    else:
        text = asked.prompt or ""
    special = asked.messages is None if asked.add_special_tokens is None else asked.add_special_tokens
    with naming_messages() if asked.messages is not None else nullcontext():
        tokens = await encode(engine, text, add_special_tokens=special)
    spellings = None
    if asked.return_token_strs:
        spellings = [spelled(engine.tokenizer, token) for token in tokens]
    return Tokenized(
        count=len(tokens), max_model_len=engine.max_model_len, tokens=tokens, token_strs=spellings
    )


async def _why_not_ready(service: Service) -> str | None:
    if service.draining.is_set():
        return "the server is shutting down"
    try:
        report = await asyncio.to_thread(service.engine.report)
    except KVRelayError as error:  # it is closed, or its router failed
        return str(error)
    alive = {worker.role for worker in report.workers if worker.is_alive}
    missing = [role for role in ("prefill", "decode") if not alive & {role, "colocated"}]
    return f"no {missing[0]} worker is alive" if missing else None


def _card(service: Service) -> ModelCard:
    engine = service.engine
    return ModelCard(
        id=service.model_name,
        created=service.created,
        root=engine.config.model,
        max_model_len=engine.max_model_len,
    )


def _json(document: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(document), status, media_type="application/json")
