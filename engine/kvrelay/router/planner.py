"""When a worker should change its role: watches queues and missed SLOs, decides seldom, says why.

Pure: the state of the pools and the time come in, a decision or None comes out.
"""

import logging
from dataclasses import dataclass
from typing import Literal

from kvrelay.errors import InvalidRequest, KVRelayError
from kvrelay.router.core import Router
from kvrelay.router.load import Load
from kvrelay.router.roles import OnDone, RoleChanges
from kvrelay.router.telemetry import Telemetry

Pool = Literal["prefill", "decode"]
logger = logging.getLogger("kvrelay")
LOOK_EVERY_S = 1.0

PATIENCE_S = 10.0  # how long the same shortage must last
PAUSE_S = 60.0  # how long nothing is decided after a decision
DEFAULT_WAIT_S = 2.0  # prefill backlog that is too long when no TTFT SLO says so
MANY_MISSED, FEW_MISSED = 0.10, 0.02  # shares of recent requests
FULL, ROOMY = 0.9, 0.5  # taken share of decode slots


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolState:
    """The two pools at one instant.

    `prefill_backlog_s`: predicted seconds of prompt tokens waiting (router's queue included), per prefill
    worker; `decode_taken`: taken share of decode's slots or blocks, whichever is more; the missed shares
    are of recent requests, 0 without an SLO.
    """

    num_prefill: int
    num_decode: int
    prefill_backlog_s: float
    decode_taken: float
    ttft_missed: float = 0.0
    itl_missed: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """One worker of role `take_from` is to become `give_to`, for `reason`."""

    take_from: Pool
    give_to: Pool
    reason: str


class Planner:
    """Decides after the same shortage has lasted `PATIENCE_S`, and at most once in `PAUSE_S`; but at once
    where one pool is empty, as nothing is served until it is not.

    A pool is short only while the other has room to spare, so that a worker never goes back and forth: what
    makes one short and what lets the other give are apart (`FULL` and `ROOMY`, `MANY_MISSED` and
    `FEW_MISSED`), and overload of both moves nobody.
    """

    def __init__(self, slo_ttft_s: float | None = None) -> None:
        self._wait_s = slo_ttft_s or DEFAULT_WAIT_S
        self._shortage: tuple[Pool, float] | None = None
        self._decided_s: float | None = None

    def decide(self, state: PoolState, now_s: float) -> Decision | None:
        """The change to make now, or None."""
        decision = _one_is_empty(state)
        if decision is not None:
            self._decided_s, self._shortage = now_s, None
            return decision
        decision = self._prefill_is_short(state) or self._decode_is_short(state)
        if decision is None:
            self._shortage = None
            return None
        if self._shortage is None or self._shortage[0] != decision.give_to:
            self._shortage = (decision.give_to, now_s)
        is_paused = self._decided_s is not None and now_s - self._decided_s < PAUSE_S
        if is_paused or now_s - self._shortage[1] < PATIENCE_S:
            return None
        self._decided_s, self._shortage = now_s, None
        return decision

    def _prefill_is_short(self, state: PoolState) -> Decision | None:
        if state.num_decode < 2 or state.decode_taken > ROOMY or state.itl_missed > FEW_MISSED:
            return None
        if state.prefill_backlog_s <= self._wait_s and state.ttft_missed <= MANY_MISSED:
            return None
        return Decision(
            "decode",
            "prefill",
            f"prefill has {state.prefill_backlog_s:.2f} s of prompts waiting (limit {self._wait_s:g} s) and "
            f"{state.ttft_missed:.0%} missed the TTFT SLO, while decode is {state.decode_taken:.0%} taken",
        )

    def _decode_is_short(self, state: PoolState) -> Decision | None:
        if state.num_prefill < 2 or state.prefill_backlog_s > self._wait_s / 4:
            return None
        if state.decode_taken < FULL and state.itl_missed <= MANY_MISSED:
            return None
        return Decision(
            "prefill",
            "decode",
            f"decode is {state.decode_taken:.0%} taken and {state.itl_missed:.0%} missed the gap SLO, while "
            f"prefill has {state.prefill_backlog_s:.2f} s of prompts waiting",
        )


def _one_is_empty(state: PoolState) -> Decision | None:
    if state.num_decode == 0 and state.num_prefill >= 2:
        return Decision("prefill", "decode", f"no decode worker is left, of prefill {state.num_prefill} are")
    if state.num_prefill == 0 and state.num_decode >= 2:
        return Decision("decode", "prefill", f"no prefill worker is left, of decode {state.num_decode} are")
    return None


def pool_state(router: Router, ttft_missed: float, itl_missed: float) -> PoolState:
    """The pools as the router sees them now; shares of recent requests that missed each SLO are told."""
    prefills, decodes = router.fleet.alive("prefill"), router.fleet.alive("decode")
    waiting = router.queue.num_prompt_tokens + sum(load.num_prefill_tokens for load in prefills)
    speeds = [load.prefill_seconds(waiting) for load in prefills]
    known = [seconds for seconds in speeds if seconds is not None]
    backlog_s = sum(known) / len(known) / len(prefills) if known else 0.0
    slots = sum(load.num_requests for load in decodes) / max(1, sum(load.max_num_seqs for load in decodes))
    blocks = sum(load.num_used_blocks for load in decodes) / max(1, sum(load.num_blocks for load in decodes))
    return PoolState(
        num_prefill=len(prefills),
        num_decode=len(decodes),
        prefill_backlog_s=backlog_s,
        decode_taken=max(slots, blocks),
        ttft_missed=ttft_missed,
        itl_missed=itl_missed,
    )


class PoolPlanner:
    """Looks at the pools once a second and carries decisions out; every one is logged with its reason."""

    def __init__(self, router: Router, roles: RoleChanges, telemetry: Telemetry) -> None:
        self._router, self._roles, self._telemetry = router, roles, telemetry
        self._planner = Planner(router.settings.slo_ttft_s)
        self._next_s = 0.0
        self._refusal = ""

    def step(self, now_s: float) -> None:
        """Decide, if it is time."""
        if now_s < self._next_s or self._roles.is_busy:
            return
        self._next_s = now_s + LOOK_EVERY_S
        decision = self._planner.decide(pool_state(self._router, *self._telemetry.missed(now_s)), now_s)
        if decision is not None:
            self._carry_out(decision, now_s)

    def _carry_out(self, decision: Decision, now_s: float) -> None:
        """Change the idlest worker that may change."""
        workers, refusal = self._router.fleet.alive(decision.take_from), ""
        for load in sorted(workers, key=lambda load: load.num_requests + load.num_prompts):
            try:
                self._roles.begin(load.worker_id, decision.give_to, now_s, self._on_done(load))
            except InvalidRequest as error:
                refusal = str(error)
                continue
            self._refusal = ""
            logger.warning("%s becomes a %s worker: %s", load.worker_id, decision.give_to, decision.reason)
            return
        if refusal != self._refusal:  # said once, not every minute
            self._refusal = refusal
            logger.warning(
                "no worker can become a %s worker (%s): %s", decision.give_to, decision.reason, refusal
            )

    def _on_done(self, load: Load) -> OnDone:
        def on_done(error: KVRelayError | None) -> None:
            self._telemetry.on_role_change("done" if error is None else "rolled_back")
            logger.warning("%s is now a %s worker", load.worker_id, load.role)
            if error is not None:
                logger.warning("its change was rolled back: %s", error)

        return on_done
