"""What the page at `/` shows: one snapshot a second for all who look, as server-sent events.

Knows the engine's report. The page itself is `page.html`, which draws rates from the snapshots' differences.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from importlib import resources

import msgspec
from fastapi import APIRouter, Request, Response

from kvrelay.errors import KVRelayError
from kvrelay.metrics import WorkerReport
from kvrelay.outputs import InFlight
from kvrelay.server.generation import Ended, until_gone
from kvrelay.server.openapi import Documents
from kvrelay.server.service import Service
from kvrelay.server.streaming import EventStream
from kvrelay.version import __version__

PERIOD_S = 1.0
MAX_SHOWN = 200  # requests in flight
INLINE = "'unsafe-inline'"
POLICY = f"default-src 'none'; style-src {INLINE}; script-src {INLINE}; connect-src 'self'; img-src data:"


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The engine at one moment; counters are totals since the start. `slo` is [met, missed]."""

    at_s: float
    model: str
    version: str
    mode: str
    policy: str
    num_requests: dict[str, int]
    num_output_tokens: int
    kv_bytes_moved: int
    energy_source: str | None
    energy_note: str
    slo: tuple[int, int] | None
    workers: list[WorkerReport]
    num_in_flight: int
    in_flight: list[InFlight]
    recent: list[Ended]


class LiveFeed:
    """Takes a snapshot when somebody looks, at most one a period."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lock = asyncio.Lock()
        self._encoded, self._taken_s = b"", -PERIOD_S

    async def latest(self) -> bytes:
        """The newest snapshot as one event. Raises `EngineClosed`, or what the router failed with."""
        async with self._lock:
            if time.monotonic() - self._taken_s > PERIOD_S / 2:
                snapshot = await asyncio.to_thread(self._take)
                self._encoded = b"data: " + msgspec.json.encode(snapshot) + b"\n\n"
                self._taken_s = time.monotonic()
            return self._encoded

    async def events(self, request: Request) -> AsyncGenerator[bytes, None]:
        """One event a period until the viewer leaves or the server stops."""
        gone = asyncio.create_task(until_gone(request.receive))
        stopping = asyncio.create_task(self._service.draining.wait())
        try:
            while not gone.done() and not stopping.done():
                try:
                    yield await self.latest()
                except KVRelayError:  # it is closed, or its router failed
                    return
                await asyncio.wait((gone, stopping), timeout=PERIOD_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            stopping.cancel()

    def _take(self) -> Snapshot:
        service, engine = self._service, self._service.engine
        report, requests = engine.report(), engine.in_flight()
        config = engine.config
        has_slo = config.slo_ttft_s is not None or config.slo_itl_s is not None
        return Snapshot(
            at_s=time.monotonic(),
            model=service.model_name,
            version=__version__,
            mode="colocated" if config.is_colocated else "disaggregated",
            policy=config.policy,
            num_requests=report.num_requests,
            num_output_tokens=report.num_output_tokens,
            kv_bytes_moved=report.kv_bytes_moved,
            energy_source=report.energy_source,
            energy_note=report.energy_note,
            slo=engine.slo() if has_slo else None,
            workers=report.workers,
            num_in_flight=len(requests),
            in_flight=requests[:MAX_SHOWN],
            recent=list(service.bridge.recent),
        )


def add_live_page(router: APIRouter, service: Service, documents: Documents) -> None:
    """Add the page and its feed to `router`."""
    page = resources.files("kvrelay.server").joinpath("page.html").read_bytes()
    feed = LiveFeed(service)
    headers = {"content-security-policy": POLICY, "x-content-type-options": "nosniff"}

    @router.get("/", **documents.text("text/html"))
    async def live_page() -> Response:
        """The engine at work, in a browser."""
        return Response(page, media_type="text/html", headers=headers)

    @router.get("/v1/kvrelay/live", **documents.text("text/event-stream"))
    async def live(request: Request) -> Response:
        """The page's feed: a snapshot a second, as server-sent events."""
        return EventStream(feed.events(request), lambda: None)
