"""A worker changes its role while requests run: drained, connected, switched, verified, or rolled back."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_router_core import World, check_rest, request

from kvrelay import LLM
from kvrelay.errors import InvalidRequest, KVRelayError, TransferFailed, WorkerFailed
from kvrelay.router.links import Links
from kvrelay.router.probes import Probes
from kvrelay.router.request import Update
from kvrelay.router.roles import DRAIN_S, STEP_S, RoleChanges
from kvrelay.types import Role, WorkerId
from kvrelay.wire import Connect, Connected, Message
from tiny_engine import assert_all_blocks_home, greedy, prompts, tiny_llm

LENGTHS = (2, 64, 65, 130, 200, 300, 90, 10)
TWO_AND_TWO: dict[str, Any] = {"prefill_workers": 2, "decode_workers": 2}


def roles_of(llm: LLM) -> dict[str, str]:
    return {worker.worker_id: worker.role for worker in llm.report().workers}


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize("transport", ["inproc", "shm"])
def test_roles_change_there_and_back_and_tokens_stay_the_same(tiny_directory: Path, transport: str) -> None:
    with tiny_llm(tiny_directory, mode="colocated") as llm:
        expected = [output.token_ids for output in llm.generate(prompts(*LENGTHS), greedy(16))]
    with tiny_llm(tiny_directory, transport=transport, policy="round_robin", **TWO_AND_TWO) as llm:
        for worker_id, role, epoch in (
            ("decode-1", "prefill", 2),
            ("decode-1", "decode", 3),
            ("prefill-0", "decode", 2),
        ):
            assert llm.engine.set_role(worker_id, role).result(30) == epoch  # type: ignore[arg-type]
            assert roles_of(llm)[worker_id] == role
            outputs = llm.generate(prompts(*LENGTHS), greedy(16))
            assert [output.token_ids for output in outputs] == expected
        busy_s = {worker.worker_id: worker.busy_s for worker in llm.report().workers}
        assert busy_s["prefill-0"]["decode"] > 0, "the worker in its new role has decoded"
        assert_all_blocks_home(llm)
        assert b'role_changes_total{model_name="tiny0",outcome="done"} 3.0' in llm.engine.metrics()


@pytest.mark.usefixtures("no_leftovers")
def test_a_change_waits_for_the_requests_in_flight(tiny_directory: Path) -> None:
    with tiny_llm(tiny_directory, mode="colocated") as llm:
        expected = [output.token_ids for output in llm.generate(prompts(*LENGTHS), greedy(200))]
    with tiny_llm(tiny_directory, policy="round_robin", **TWO_AND_TWO) as llm:
        change = None
        outputs: dict[int, list[int]] = {}
        for index, event in llm.stream_many(prompts(*LENGTHS), greedy(200)):
            assert event.error is None
            if event.token_ids and change is None:
                change = llm.engine.set_role("decode-1", "prefill")
            if event.output is not None:
                outputs[index] = event.output.token_ids
        assert change is not None
        assert change.result(30) == 2
        retried = llm.report().num_requests["retried"]
        assert_all_blocks_home(llm)
    assert [outputs[index] for index in range(len(LENGTHS))] == expected
    assert retried == 0


def test_what_cannot_be_is_refused_with_the_reason(tiny_directory: Path) -> None:
    with tiny_llm(tiny_directory, decode_workers=2) as llm:
        for worker_id, role, reason in (
            ("prefill-0", "decode", "one must be left"),
            ("decode-0", "decode", "is a decode worker already"),
            ("decode-7", "prefill", "not alive; there are decode-0, decode-1, prefill-0"),
            ("decode-0", "colocated", "expected prefill or decode"),
        ):
            with pytest.raises(InvalidRequest, match=reason):
                llm.engine.set_role(worker_id, role).result(5)  # type: ignore[arg-type]
        assert set(roles_of(llm).values()) == {"prefill", "decode"}
    with tiny_llm(tiny_directory, mode="colocated") as llm, pytest.raises(InvalidRequest, match="colocated"):
        llm.engine.set_role("colocated-0", "prefill").result(5)


def test_a_worker_that_fails_its_verification_gets_its_role_back(tiny_directory: Path) -> None:
    with tiny_llm(tiny_directory, transport="faulty:inner=inproc,fail=1", decode_workers=2) as llm:
        with pytest.raises(TransferFailed, match="gave up after 9 attempts"):
            llm.engine.set_role("decode-1", "prefill").result(30)
        assert roles_of(llm)["decode-1"] == "decode"
        assert b'outcome="rolled_back"} 1.0' in llm.engine.metrics()
        assert len(llm.generate([[5]] * 4, greedy(4))) == 4, "one-token prompts move no KV"
        assert_all_blocks_home(llm)


# Under a virtual clock -----------------------------------------------------------------------------------


class ChangingWorld(World):
    """The router and fake workers of test_router_core, with role changes; handshakes may fail or be lost."""

    def __init__(self, seed: int, trouble: float, connects: str = "works") -> None:
        super().__init__(seed, 2, 2, "least_loaded", trouble)
        self.connects = connects
        self.probes = Probes(self.router)
        self.router._deliver = self.told
        links = Links(self.connect, lambda worker_id: self.router.workers[worker_id].hello.descriptor)
        links.connected = {(WorkerId(f"p{i}"), WorkerId(f"d{j}")) for i in (0, 1) for j in (0, 1)}
        self.links, self.roles = links, RoleChanges(self.router, self.probes, links)
        self.done: list[KVRelayError | None] = []
        self.network.later(self.tick, 1.0)

    def told(self, update: Update) -> None:
        if not self.probes.on_update(update):
            self.updates[update.request_id].append(update)

    def tick(self) -> None:
        self.router.tick(self.network.now_s)
        self.roles.step(self.network.now_s)
        if self.router.requests or self.roles.is_busy or self.network.now_s < 60:
            self.network.later(self.tick, self.network.now_s + 1.0)

    def connect(self, worker_id: WorkerId, message: Message) -> None:
        assert isinstance(message, Connect)
        error = "LayoutMismatch: dtype" if self.connects == "fails" else ""
        answer = Connected(worker_id=worker_id, peer=message.peer.worker_id, error=error)

        def answered() -> None:
            link, _, why = self.links.on_connected(answer, self.network.now_s)
            self.roles.on_connected(link, why, self.network.now_s)

        if self.connects != "lost":
            self.network.later(answered)

    def change(self, worker_id: str, role: Role, at_s: float) -> None:
        def begin() -> None:
            try:
                self.roles.begin(WorkerId(worker_id), role, self.network.now_s, self.done.append)
            except InvalidRequest as error:
                self.done.append(error)

        self.network.later(begin, at_s)

    def role(self, worker_id: str) -> tuple[str, int, bool]:
        load = self.router.fleet.loads[WorkerId(worker_id)]
        return (load.role, load.role_epoch, load.is_draining)


def test_the_steps_of_a_change() -> None:
    world = ChangingWorld(0, 0.0)
    world.change("d1", "prefill", 1.0)
    world.network.run()
    assert world.done == [None]
    assert world.role("d1") == ("prefill", 2, False)
    assert {(p, d) for p, d in world.links.connected if p == "d1"} == {("d1", "d0")}
    check_rest(world, [])


@pytest.mark.parametrize(("connects", "kind"), [("fails", KVRelayError), ("lost", WorkerFailed)])
def test_a_handshake_that_fails_or_is_lost_rolls_back(connects: str, kind: type[KVRelayError]) -> None:
    world = ChangingWorld(0, 0.0, connects)
    world.change("p1", "decode", 1.0)
    world.network.run()
    assert [type(error) for error in world.done] != [type(None)]
    assert isinstance(world.done[0], kind)
    assert world.role("p1") == ("prefill", 1, False)
    if connects == "lost":
        assert f"connecting took longer than {STEP_S:g} s" in str(world.done[0])


def test_each_switch_is_an_epoch_of_its_own_and_so_is_each_switch_back() -> None:
    """The request that verifies is ended from outside: that is rolled back, and the next has a new name."""
    world = ChangingWorld(0, 0.0)
    world.change("d1", "prefill", 1.0)
    world.change("d1", "prefill", 30.0)
    names: list[str] = []

    def spoil() -> None:
        found = [name for name in world.router.requests if name.startswith("probe-")]
        if found and not names:
            assert world.role("d1") == ("prefill", 2, True), "others stay away until it is verified"
            world.router.finish(found[0], "abort", world.network.now_s)
        names.extend(name for name in found if name not in names)
        if len(world.done) < 2:
            world.network.later(spoil, world.network.now_s + 0.05)

    world.network.later(spoil, 1.0)
    world.network.run()
    assert [str(error) for error in world.done] == ["the request that verifies it was aborted", "None"]
    assert names == ["probe-d1-prefill-2", "probe-d1-prefill-4"]
    assert world.role("d1") == ("prefill", 4, False)
    check_rest(world, [])


def test_a_verification_that_takes_too_long_is_rolled_back_once() -> None:
    world = ChangingWorld(0, 0.0)
    world.change("d1", "prefill", 1.0)

    def hurry() -> None:
        if any(name.startswith("probe-") for name in world.router.requests):
            world.roles.step(world.network.now_s + STEP_S + 1)
            assert not world.router.requests, "the request is ended too"
        elif not world.done:
            world.network.later(hurry, world.network.now_s + 0.05)

    world.network.later(hurry, 1.0)
    world.network.run()
    assert [str(error) for error in world.done] == ["d1 as prefill: verifying took longer than 60 s"]
    assert world.role("d1") == ("decode", 3, False)
    check_rest(world, [])


def test_requests_that_do_not_end_in_time_are_moved() -> None:
    world = ChangingWorld(1, 0.0)
    long = [request(number, 65, 400) for number in range(4)]
    for routed in long:
        world.submit(routed)
    world.change("d1", "prefill", 10.0)
    world.network.run()
    assert world.done == [None]
    check_rest(world, long)
    assert world.router.counts.num_ended["failed"] == 0
    moved = [routed for routed in long if routed.attempt > 1]
    assert moved, f"some were on d1 for longer than {DRAIN_S:g} s"


def test_only_the_handshakes_of_the_change_count() -> None:
    world = ChangingWorld(0, 0.0, "lost")
    world.change("d1", "prefill", 1.0)

    def strangers() -> None:
        world.roles.on_connected((WorkerId("p0"), WorkerId("d0")), WorkerFailed("x"), world.network.now_s)
        assert world.roles.is_busy
        assert world.role("d1") == ("decode", 1, True)

    world.network.later(strangers, 40.0)
    world.network.run()
    assert "connecting took longer" in str(world.done[0])


def test_one_as_large_must_stay_in_the_role() -> None:
    world = ChangingWorld(0, 0.0)
    world.router.fleet.loads[WorkerId("d0")].num_blocks -= 1
    world.change("d1", "prefill", 1.0)
    world.change("d0", "prefill", 2.0)
    world.network.run()
    assert "no other decode worker has as many" in str(world.done[0])
    assert world.done[1] is None


def test_a_second_change_is_refused_and_a_death_ends_the_first() -> None:
    world = ChangingWorld(2, 0.0, "lost")
    world.change("d1", "prefill", 1.0)
    world.change("p1", "decode", 2.0)
    world.network.later(lambda: world.kill(WorkerId("d1")), 3.0)
    world.network.run()
    assert "of d1 is being changed: one at a time" in str(world.done[0])
    assert "died while its role was changed" in str(world.done[1])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.05, 0.3]),
    st.sampled_from(["works", "fails", "lost"]),
    st.lists(
        st.tuples(
            st.sampled_from(["p0", "p1", "d0", "d1"]),
            st.sampled_from(["prefill", "decode"]),
            st.floats(0, 40),
        ),
        max_size=4,
    ),
    st.integers(0, 2),
)
def test_whatever_changes_every_request_ends_once_and_every_block_comes_home(
    seed: int, trouble: float, connects: str, changes: list[tuple[str, Role, float]], num_deaths: int
) -> None:
    world = ChangingWorld(seed, trouble, connects)
    requests = [request(i, world.chance.choice([1, 65, 70]), world.chance.randint(1, 40)) for i in range(8)]
    for routed in requests:
        world.submit(routed)
    for change in changes:
        world.change(*change)
    for worker_id in world.chance.sample(sorted(world.workers), num_deaths):
        world.network.later(lambda w=worker_id: world.kill(w), world.chance.uniform(0, 30))  # type: ignore[misc]
    world.network.run()
    check_rest(world, requests)
    assert len(world.done) == len(changes), "every change ends, once"
    assert not any(load.is_draining for load in world.router.fleet.loads.values())
    if not num_deaths:
        assert world.router.fleet.alive("prefill")
        assert world.router.fleet.alive("decode")
        assert world.router.counts.num_ended["failed"] == 0 or trouble
