"""Turns running sequences into tokens: one for each, step by step, reported as each step ends."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.cache.arrivals import Lacking
from kvrelay.decode_steps import Tokens
from kvrelay.errors import ModelError
from kvrelay.sampler import Sampled
from kvrelay.scheduler.decode import PENDING, DecodeScheduler, DecodeSequence
from kvrelay.types import NO_HAND_OFF, FinishReason, TokenLogprobs
from kvrelay.wire import NewToken, Preempted, StepReport
from kvrelay.worker.early import EarlySequences
from kvrelay.worker.parts import WorkerParts


@dataclass(frozen=True, slots=True)
class Step:
    """A step under way: its batch, the place of each sequence's new token, and the wait for all of them."""

    batch: Sequence[DecodeSequence]
    places: Sequence[int]
    tokens: Tokens
    start_s: float
    cpu_s: float


class Generation:
    """Begins and ends the steps of one worker's decode scheduler."""

    def __init__(self, parts: WorkerParts, scheduler: DecodeScheduler, early: EarlySequences) -> None:
        self._parts, self._scheduler, self._early = parts, scheduler, early
        self._begun: Step | None = None
        self._ended_s = 0.0

    def step(self) -> int:
        """Begin one more token for every sequence of the next batch; how many are in it, or in the last.

        Its tokens are reported before this returns; where the runner runs ahead, those of the step before.
        """
        is_ahead = self._parts.runner.runs_ahead(self._scheduler.running)
        num_ended = 0 if is_ahead else self._end_step()
        batch, preempted = self._scheduler.plan()
        for sequence in preempted:
            request = sequence.request
            self._parts.send(Preempted(request_id=request.request_id, attempt=request.attempt))
        begun = self._begin_step(batch) if batch else None
        num_ended += self._end_step()
        self._begun = begun
        if not is_ahead:
            self._end_step()
        return len(batch) or num_ended

    def reported_until(self, now_s: float) -> float:
        """The time before which every step that began has been reported."""
        return now_s if self._begun is None else self._begun.start_s

    def close(self) -> None:
        """Drop every sequence and the step under way."""
        for sequence in list(self._scheduler.running):
            self._scheduler.remove(sequence)
        self._begun = None

    def _begin_step(self, batch: Sequence[DecodeSequence]) -> Step | None:
        """Launch the batch's step; None when it failed."""
        start_s, cpu_s = time.monotonic(), time.process_time()
        for sequence in batch:
            if not sequence.started:
                sequence.started = True
                self._parts.mark(sequence.request, "decode_started", start_s)
        places = [len(sequence.token_ids) for sequence in batch]
        try:
            tokens = self._parts.runner.launch(batch)
        except RuntimeError as error:  # torch's, out of memory included
            self._fail_step(batch, error)
            return None
        for sequence in batch:
            sequence.token_ids.append(PENDING)
        return Step(batch, places, tokens, start_s, time.process_time() - cpu_s)

    def _end_step(self) -> int:
        """Wait for the step that has begun, if any, and report its tokens; how many sequences it had.

        Those that were preempted or withdrawn meanwhile get none, nor do those of a step that failed.
        """
        step, self._begun = self._begun, None
        if step is None:
            return 0
        cpu_s = time.process_time()
        try:
            results = step.tokens()
        except RuntimeError as error:
            self._fail_step(step.batch, error)
            return len(step.batch)
        start_s, self._ended_s = max(step.start_s, self._ended_s), time.monotonic()
        tokens = []
        for sequence, place, result in zip(step.batch, step.places, results, strict=True):
            if sequence not in self._scheduler.running:
                continue
            tokens += self._take(sequence, place, result)
        self._report(step.batch, tokens, start_s, step.cpu_s + time.process_time() - cpu_s)
        return len(step.batch)

    def _take(self, sequence: DecodeSequence, place: int, result: Sampled | Lacking | None) -> list[NewToken]:
        """What came of a step for one sequence, whose new token has that place; none if nothing did."""
        later = sequence.token_ids[place + 1 :]
        del sequence.token_ids[place:]
        match result:
            case None:
                self._fail_unsound(sequence)
            case Lacking():
                self._early.stall(sequence, result.tiles)
            case _:
                return [self._append(sequence, later, *result)]
        return []

    def _fail_step(self, batch: Sequence[DecodeSequence], error: RuntimeError) -> None:
        lost = [sequence for sequence in batch if sequence in self._scheduler.running]
        for sequence in lost:
            self._scheduler.remove(sequence, is_sound=False)
        self._parts.fail_step([sequence.request for sequence in lost], error)

    def _fail_unsound(self, sequence: DecodeSequence) -> None:
        self._scheduler.remove(sequence, is_sound=False)
        position = len(sequence.token_ids)
        error = ModelError(
            f"the logits at position {position} are not finite numbers: no token can be chosen"
        )
        self._parts.fail(sequence.request, error, retryable=False)

    def _append(
        self, sequence: DecodeSequence, later: Sequence[int], token_id: int, logprobs: TokenLogprobs | None
    ) -> NewToken:
        """Give the sequence its newest token, and back those that are `later`, still to be computed."""
        sequence.token_ids.append(token_id)
        reason: FinishReason | None = self._scheduler.finish_reason(
            sequence, self._parts.runner.eos_token_ids
        )
        if reason is not None:
            self._scheduler.remove(sequence)
        sequence.token_ids += later
        return NewToken(
            request_id=sequence.request.request_id,
            attempt=sequence.request.attempt,
            token_id=token_id,
            logprobs=logprobs,
            finish_reason=reason,
        )

    def _report(
        self,
        batch: Sequence[DecodeSequence],
        tokens: Sequence[NewToken],
        start_s: float,
        cpu_s: float,
    ) -> None:
        self._parts.send(
            StepReport(
                worker_id=self._parts.config.worker_id,
                phase="decode",
                start_s=start_s,
                end_s=self._ended_s,
                cpu_s=cpu_s,
                num_tokens={token.request_id: 1 for token in tokens},
                tokens=tuple(tokens),
                attention=self._parts.runner.attention_by([sequence.request for sequence in batch]),
                hand_off={s.request.request_id: s.hand_off for s in batch if s.hand_off != NO_HAND_OFF},
            )
        )
        for sequence in batch:
            sequence.hand_off = NO_HAND_OFF
