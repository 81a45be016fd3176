"""One worker's loop: messages in, transport events in, one decode step, one prefill step, reports out."""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
import zmq

from kvrelay import codec, wire
from kvrelay.config import WorkerConfig
from kvrelay.errors import InvalidConfig, KVRelayError, TransportError
from kvrelay.transport.base import InprocHub, Notice, WriteDone, WriteFailed
from kvrelay.wire import (
    MAX_CACHE_CHANGES,
    Abort,
    CacheChanged,
    Connect,
    Connected,
    Descriptor,
    Heartbeat,
    Hello,
    Prefill,
    Reserve,
    Shutdown,
    StartFailed,
    Stopped,
    Wanted,
    WriterGone,
)
from kvrelay.worker.decode import DecodeSide
from kvrelay.worker.loading import load_parts
from kvrelay.worker.parts import WorkerParts
from kvrelay.worker.prefill import PrefillSide

HEARTBEAT_S = 0.1


class Worker:
    """Both sides over one set of parts, driven by `run` until the router says `Shutdown`."""

    def __init__(self, parts: WorkerParts, socket: "zmq.Socket[bytes]") -> None:
        self._parts, self._socket = parts, socket
        self.decode = DecodeSide(parts)
        self.prefill = PrefillSide(parts, self.decode)
        self._poller = zmq.Poller()
        for pollable in (socket, *parts.transport.pollables()):
            self._poller.register(pollable, zmq.POLLIN)
        self._next_heartbeat_s = 0.0
        self._running = True
        if parts.backing is not None:
            parts.backing.after_each = self._show_life

    def run(self) -> None:
        """Serve until told to stop; then drop everything and report what did not come home."""
        busy = False
        while self._receive(0 if busy else HEARTBEAT_S):
            self._poll_transport()
            now_s = time.monotonic()
            self.prefill.renew(now_s)
            self.decode.expire(now_s)
            self.prefill.give_up_hung(now_s)
            self.decode.admit()
            num_decoded = self.decode.step()
            prefilled = self.prefill.step(num_decoded)
            was_busy, busy = busy, num_decoded > 0 or prefilled
            self._beat(time.monotonic(), is_due=was_busy and not busy)  # a report taken now is up to date
        self._stop()

    def _receive(self, timeout_s: float) -> bool:
        """Wait for something to do, handle every message; False once told to stop."""
        self._poller.poll(int(timeout_s * 1000))
        while self._running and self._socket.poll(0):
            self._handle(codec.decode(self._socket.recv(), "router_to_worker"))
        return self._running

    def _handle(self, message: Any) -> None:
        match message:
            case Connect():
                self._connect(message.peer)
            case Reserve():
                self.decode.reserve(message)
            case Prefill():
                self.prefill.start(message)
            case Abort() if message.ticket is not None:
                self.prefill.abort(message)
            case Abort():
                self.decode.abort(message)
            case Wanted():
                self.prefill.on_wanted(message)
            case WriterGone():
                self.decode.writer_gone(message)
            case Shutdown():
                self._running = False

    def _connect(self, peer: Descriptor) -> None:
        error = ""
        try:
            self._parts.transport.connect(peer)
        except TransportError as refusal:
            error = f"{type(refusal).__name__}: {refusal}"
        worker_id = self._parts.config.worker_id
        self._parts.send(Connected(worker_id=worker_id, peer=peer.worker_id, error=error))

    def _poll_transport(self) -> None:
        done = []
        for event in self._parts.transport.poll():
            match event:
                case WriteDone():
                    done.append(event)
                case WriteFailed():
                    self.prefill.on_write_failed(event)
                case Notice():
                    self.decode.on_notice(event.message)
        self.prefill.on_writes_done(done)

    def _beat(self, now_s: float, *, is_due: bool) -> None:
        if now_s < self._next_heartbeat_s and not is_due:
            return
        self._next_heartbeat_s = now_s + HEARTBEAT_S
        pool = self._parts.pool
        self._parts.send(
            Heartbeat(
                worker_id=self._parts.config.worker_id,
                at_s=min(self.prefill.reported_until(now_s), self.decode.reported_until(now_s)),
                num_free_blocks=pool.num_free,
                num_blocks=pool.num_blocks,
                num_running=len(self.decode.scheduler.running),
                num_waiting=len(self.decode.scheduler.waiting) + len(self.prefill),
                num_tickets=len(self.decode.tickets),
                num_cached_blocks=pool.num_cached,
                peak_blocks=pool.peak_blocks,
                counters=self._parts.transport.telemetry() | self._parts.counters,
            )
        )
        added, removed = pool.take_changes(MAX_CACHE_CHANGES)
        if added or removed:
            self._parts.send(
                CacheChanged(
                    worker_id=self._parts.config.worker_id, added=tuple(added), removed=tuple(removed)
                )
            )

    def _show_life(self) -> None:
        """In the middle of something that may outlast a lease."""
        now_s = time.monotonic()
        self.prefill.renew(now_s)
        self._beat(now_s, is_due=False)

    def _stop(self) -> None:
        self.prefill.close()
        num_promised = self.decode.close()
        pool = self._parts.pool
        pool.check()
        pool.close()
        leaked = pool.num_blocks - pool.num_free - num_promised
        self._parts.send(Stopped(worker_id=self._parts.config.worker_id, num_leaked_blocks=leaked))


def serve(config: WorkerConfig, hub: InprocHub | None = None) -> None:
    """Load, say hello, serve, and close; a failure to start is told to the router and raised."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, config.worker_id.encode())
    socket.setsockopt(zmq.LINGER, 2000)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.connect(config.endpoint)

    def send(message: wire.Message) -> None:
        socket.send(codec.encode(message))

    try:
        _serve(config, hub, socket, send)
    except KVRelayError as error:
        send(StartFailed(worker_id=config.worker_id, error=type(error).__name__, message=str(error)))
        raise
    finally:
        socket.close()
        context.term()


def _serve(
    config: WorkerConfig,
    hub: InprocHub | None,
    socket: "zmq.Socket[bytes]",
    send: Callable[[wire.Message], None],
) -> None:
    start_s = time.monotonic()
    try:
        parts, descriptor = load_parts(config, hub, send)
    except torch.OutOfMemoryError as error:
        raise InvalidConfig(f"{config.worker_id} does not fit on its device: {error}") from error
    try:
        send(
            Hello(
                worker_id=config.worker_id,
                pid=os.getpid(),
                role=config.role,
                device=str(parts.store.device),
                model_impl=parts.runner.impl,
                num_threads=config.num_threads,
                descriptor=descriptor,
                load_s=time.monotonic() - start_s,
            )
        )
        Worker(parts, socket).run()
    finally:
        parts.close()
