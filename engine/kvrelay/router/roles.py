"""Changes of a worker's role at run time: drain, connect, switch, verify by a real request, or roll back.

Every worker can do both halves, so a role is only what the router sends it. Each switch starts a new role
epoch of the worker; the request that verifies it carries the epoch in its id, so that nothing of an earlier
change can confirm a later one. Pure: time comes in, messages go out through the router's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from kvrelay.errors import InvalidRequest, KVRelayError, WorkerFailed
from kvrelay.router.core import Router
from kvrelay.router.links import Link, Links
from kvrelay.router.load import Load
from kvrelay.router.probes import Probes
from kvrelay.router.request import Update
from kvrelay.types import RequestId, Role, WorkerId

DRAIN_S = 30.0  # how long requests in flight may take to end by themselves before they are moved
STEP_S = 60.0  # how long connecting, and verifying, may take

OnDone = Callable[[KVRelayError | None], None]


@dataclass(slots=True, eq=False)
class _Change:
    load: Load
    old: Role
    new: Role
    on_done: OnDone
    deadline_s: float
    state: Literal["draining", "connecting", "verifying"] = "draining"
    missing: set[Link] = field(default_factory=set)
    probe: RequestId | None = None


class RoleChanges:
    """One change at a time: a worker is connected to those that are its partners once it has changed."""

    def __init__(self, router: Router, probes: Probes, links: Links) -> None:
        self._router, self._probes, self._links = router, probes, links
        self._change: _Change | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a change is under way."""
        return self._change is not None

    def begin(self, worker_id: WorkerId, role: Role, now_s: float, on_done: OnDone) -> None:
        """Start a change; `on_done` is called once, with None or the error it was rolled back for.

        Raises `InvalidRequest` when it cannot be: no such worker, no others of its role to take over, ….
        """
        load = self._checked(worker_id, role)
        load.is_draining = True
        self._change = _Change(load, load.role, role, on_done, now_s + DRAIN_S)
        self.step(now_s)

    def step(self, now_s: float) -> None:
        """Go on with the change as far as it goes now."""
        change = self._change
        if change is None:
            return
        worker_id = change.load.worker_id
        if not self._router.workers[worker_id].is_alive:
            self._end(change, WorkerFailed(f"{worker_id} died while its role was changed"))
        elif change.state == "draining":
            self._drain(change, now_s)
        elif now_s > change.deadline_s:
            reason = f"{worker_id} as {change.new}: {change.state} took longer than {STEP_S:g} s"
            self._roll_back(change, WorkerFailed(reason), now_s)

    def on_connected(self, link: Link, error: KVRelayError | None, now_s: float) -> None:
        """A pair shook hands, or failed to."""
        change = self._change
        if change is None or change.state != "connecting" or link not in change.missing:
            return
        change.missing.discard(link)
        if error is not None:
            self._roll_back(change, error, now_s)
        elif not change.missing:
            self._verify(change, now_s)

    def close(self, error: KVRelayError) -> None:
        """Give up what is under way."""
        if self._change is not None:
            self._end(self._change, error)

    def _checked(self, worker_id: WorkerId, role: Role) -> Load:
        load = self._router.fleet.loads.get(worker_id)
        if load is None or not self._router.workers[worker_id].is_alive:
            known = ", ".join(sorted(self._router.fleet.loads))
            raise InvalidRequest(f"worker {worker_id!r} is not alive; there are {known}")
        if role not in ("prefill", "decode") or load.role == "colocated":
            raise InvalidRequest(
                f"role {role!r} of a {load.role} worker: expected prefill or decode of either"
            )
        if self._change is not None:
            raise InvalidRequest(f"the role of {self._change.load.worker_id} is being changed: one at a time")
        if load.role == role:
            raise InvalidRequest(f"{worker_id} is a {role} worker already")
        others = [
            other
            for other in self._router.fleet.alive(load.role)
            if other is not load and not other.is_draining and other.num_blocks >= load.num_blocks
        ]
        if not others:
            raise InvalidRequest(
                f"{worker_id} has {load.num_blocks} KV blocks, and no other {load.role} worker has as many: "
                "one must be left"
            )
        return load

    def _drain(self, change: _Change, now_s: float) -> None:
        worker_id = change.load.worker_id
        if now_s > change.deadline_s:
            self._router.move_away(worker_id, now_s)
        if not self._router.has_work(worker_id):
            change.state, change.deadline_s = "connecting", now_s + STEP_S
            change.missing = self._needed(change) - self._links.connected
            for link in sorted(change.missing):
                self._links.connect(link, now_s)
            if not change.missing:
                self._verify(change, now_s)

    def _needed(self, change: _Change) -> set[Link]:
        mine = change.load.worker_id
        partners = self._router.fleet.alive("decode" if change.new == "prefill" else "prefill")
        others = [load.worker_id for load in partners if load is not change.load]
        return {(mine, other) if change.new == "prefill" else (other, mine) for other in others}

    def _verify(self, change: _Change, now_s: float) -> None:
        """Switch, and send one real request through the worker in its new role; others still stay away."""
        load, pair = change.load, min(self._needed(change), default=None)
        if pair is None:
            error = WorkerFailed(f"no other {change.old} worker is left: {load.worker_id} stays one")
            self._roll_back(change, error, now_s)
            return
        load.role, load.role_epoch = change.new, load.role_epoch + 1
        change.state, change.deadline_s = "verifying", now_s + STEP_S
        name = f"{load.worker_id}-{change.new}-{load.role_epoch}"
        change.probe = self._probes.send(name, pair, now_s, lambda _, update: self._verified(change, update))

    def _verified(self, change: _Change, update: Update) -> None:
        if self._change is not change:
            return  # rolled back before
        error = update.error
        if error is None and update.finish_reason == "abort":
            error = WorkerFailed("the request that verifies it was aborted")
        change.probe = None
        if error is not None:
            self._roll_back(change, error, update.at_s)
        else:
            self._end(change, None)

    def _roll_back(self, change: _Change, error: KVRelayError, now_s: float) -> None:
        if change.load.role != change.old:
            change.load.role, change.load.role_epoch = change.old, change.load.role_epoch + 1
        probe_id, change.probe = change.probe, None
        self._end(change, error)
        if probe_id is not None:
            self._router.finish(probe_id, "abort", now_s)

    def _end(self, change: _Change, error: KVRelayError | None) -> None:
        change.load.is_draining = False
        self._change = None
        change.on_done(error)
