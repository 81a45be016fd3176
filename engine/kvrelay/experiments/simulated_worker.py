"""A worker that computes nothing and takes the time and the power that two straight lines say it would.

Speaks the workers' side of the protocol to the real router, in virtual time.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from kvrelay.types import (
    KVLayout,
    LifeEvent,
    Phase,
    RequestSpec,
    Role,
    TicketId,
    TransferTicket,
    WorkerId,
)
from kvrelay.wire import (
    Abort,
    Descriptor,
    Hello,
    Mark,
    Message,
    NewToken,
    Prefill,
    Reserve,
    Reserved,
    StepReport,
)

CHUNK_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerModel:
    """How fast a simulated worker is and what it draws; every step takes at least `step_s`."""

    worker_id: str
    role: Role
    prefill_tokens_per_s: float = 4000.0
    step_s: float = 0.01
    step_s_per_sequence: float = 0.0005
    idle_w: float = 50.0
    busy_w: float = 300.0
    num_blocks: int = 4096
    max_num_seqs: int = 32


class World(Protocol):
    """What a worker needs of the simulation around it."""

    now_s: float

    def later(self, delay_s: float, function: Callable[[], None]) -> None:
        """Call `function` in `delay_s` of virtual time."""

    def say(self, message: Message) -> None:
        """Send to the router."""

    def fill(self, ticket: TransferTicket) -> None:
        """The ticket's KV is on its way to its decode worker."""


@dataclass(slots=True, eq=False)
class _Sequence:
    spec: RequestSpec
    num_tokens: int
    started: bool = False


@dataclass(slots=True, eq=False)
class _Prompt:
    message: Prefill
    num_left: int
    started: bool = False


@dataclass(slots=True, eq=False)
class SimulatedWorker:
    """Alternates a decode step for all its sequences with a chunk of the oldest prompt, as real ones do."""

    model: WorkerModel
    world: World
    prompts: list[_Prompt] = field(default_factory=list)
    running: list[_Sequence] = field(default_factory=list)
    specs: dict[TicketId, RequestSpec] = field(default_factory=dict)
    busy_s: float = 0.0
    is_stepping: bool = False

    def on(self, message: Message) -> None:
        """A message from the router."""
        match message:
            case Reserve():
                self._reserve(message.request)
            case Prefill():
                self.prompts.append(_Prompt(message, message.request.num_prefill_tokens))
                self._wake()
            case Abort():
                key = (message.request_id, message.attempt)
                self.running = [s for s in self.running if (s.spec.request_id, s.spec.attempt) != key]
                self.prompts = [
                    p
                    for p in self.prompts
                    if (p.message.request.request_id, p.message.request.attempt) != key
                ]

    def commit(self, ticket_id: TicketId) -> None:
        """The KV of a ticket has arrived."""
        self._run(self.specs.pop(ticket_id))

    def _reserve(self, spec: RequestSpec) -> None:
        ticket = TransferTicket(
            ticket_id=TicketId(f"{spec.request_id}/{spec.attempt}"),
            request_id=spec.request_id,
            attempt=spec.attempt,
            decode_worker=WorkerId(self.model.worker_id),
            epoch=1,
            block_ids=(),
            num_tokens=spec.num_prefill_tokens,
            lease_s=1.0,
        )
        self.specs[ticket.ticket_id] = spec
        now_s = self.world.now_s
        self.world.say(Reserved(request_id=spec.request_id, attempt=spec.attempt, ticket=ticket, at_s=now_s))

    def _run(self, spec: RequestSpec) -> None:
        self.running.append(_Sequence(spec, len(spec.token_ids)))
        self._mark(spec, "kv_committed")
        self._wake()

    def _wake(self) -> None:
        if not self.is_stepping and (self.running or self.prompts):
            self.is_stepping = True
            self._step()

    def _step(self) -> None:
        start_s = self.world.now_s
        batch = self.running[: self.model.max_num_seqs]
        decode_s = self.model.step_s + self.model.step_s_per_sequence * len(batch) if batch else 0.0
        for sequence in batch:
            if not sequence.started:
                sequence.started = True
                self._mark(sequence.spec, "decode_started")
        prompt = self.prompts[0] if self.prompts else None
        chunk = min(prompt.num_left, CHUNK_TOKENS) if prompt is not None else 0
        prefill_s = max(self.model.step_s, chunk / self.model.prefill_tokens_per_s) if prompt else 0.0
        if prompt is not None and not prompt.started:
            prompt.started = True
            self._mark(prompt.message.request, "prefill_started")
        self.busy_s += decode_s + prefill_s
        if batch:
            self.world.later(decode_s, lambda: self._decoded(batch, start_s))
        end_s = decode_s + prefill_s
        self.world.later(end_s, lambda: self._stepped(prompt, chunk, start_s + decode_s))

    def _decoded(self, batch: list[_Sequence], start_s: float) -> None:
        alive = [sequence for sequence in batch if sequence in self.running]
        tokens = []
        for sequence in alive:
            sequence.num_tokens += 1
            is_last = sequence.num_tokens >= sequence.spec.max_total_tokens
            if is_last:
                self.running.remove(sequence)
            tokens.append(
                NewToken(
                    request_id=sequence.spec.request_id,
                    attempt=sequence.spec.attempt,
                    token_id=0,
                    finish_reason="length" if is_last else None,
                )
            )
        self._report("decode", start_s, {token.request_id: 1 for token in tokens}, tuple(tokens))

    def _stepped(self, prompt: _Prompt | None, chunk: int, start_s: float) -> None:
        if prompt is not None:
            request, ticket = prompt.message.request, prompt.message.ticket
            prompt.num_left -= chunk
            self._report("prefill", start_s, {request.request_id: chunk})
            if prompt.num_left <= 0 and prompt in self.prompts:
                self.prompts.remove(prompt)
                self._mark(request, "prefill_finished")
                self.world.fill(ticket)
        self.is_stepping = False
        self._wake()

    def _report(
        self, phase: Phase, start_s: float, num_tokens: dict[str, int], tokens: tuple[NewToken, ...] = ()
    ) -> None:
        self.world.say(
            StepReport(
                worker_id=WorkerId(self.model.worker_id),
                phase=phase,
                start_s=start_s,
                end_s=self.world.now_s,
                cpu_s=0.0,
                num_tokens=num_tokens,
                tokens=tokens,
            )
        )

    def _mark(self, spec: RequestSpec, event: LifeEvent) -> None:
        mark = Mark(request_id=spec.request_id, attempt=spec.attempt, event=event, at_s=self.world.now_s)
        self.world.say(mark)


def hello_of(model: WorkerModel) -> Hello:
    """How the worker introduces itself."""
    worker_id = WorkerId(model.worker_id)
    layout = KVLayout(model="simulated", dtype="bfloat16", num_layers=1, num_kv_heads=1, head_dim=64)
    descriptor = Descriptor(
        worker_id=worker_id,
        epoch=1,
        layout=layout,
        num_blocks=model.num_blocks,
        address={},
    )
    return Hello(
        worker_id=worker_id,
        pid=0,
        role=model.role,
        device="simulated",
        model_impl="simulated",
        num_threads=1,
        descriptor=descriptor,
        load_s=0.0,
    )
