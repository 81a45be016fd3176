"""BlockPool: reference counts, what is found again, and the integrity check that must see what is wrong."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvrelay.cache.pool import BlockPool
from kvrelay.types import num_blocks


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (1, 1), (63, 1), (64, 1), (65, 2), (129, 3)])
def test_num_blocks_rounds_up_at_the_edges_of_a_block(num_tokens: int, expected: int) -> None:
    assert num_blocks(num_tokens) == expected


def test_lowest_ids_first_and_all_come_back() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(3), pool.allocate(1)
    assert first == [0, 1, 2]
    assert second == [3]
    assert pool.num_free == 0
    pool.release(first)
    pool.release(second)
    pool.check()
    assert pool.num_free == 4
    assert pool.peak_blocks == 4


def test_released_list_is_handed_out_again_in_its_own_order() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    pool.release(blocks)
    assert pool.allocate(3) == blocks


@pytest.mark.parametrize("count", [-1, 3])
def test_more_than_is_free_is_the_callers_bug(count: int) -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="2 free"):
        pool.allocate(count)
    assert pool.num_free == 2
    pool.check()


@pytest.mark.parametrize(("count", "fits"), [(0, True), (2, True), (3, False)])
def test_can_allocate_says_what_allocate_does(count: int, fits: bool) -> None:
    assert BlockPool(2).can_allocate(count) is fits


def test_shared_block_is_free_only_after_its_last_owner() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    pool.retain(blocks)
    pool.release(blocks)
    assert pool.num_free == 0
    pool.release(blocks)
    assert pool.num_free == 1
    pool.check()


def test_double_release_and_sharing_a_free_block_are_refused() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks)
    with pytest.raises(AssertionError, match="free and cannot be shared"):
        pool.retain(blocks)
    pool.check()


def test_peak_does_not_shrink() -> None:
    pool = BlockPool(8)
    blocks = pool.allocate(5)
    pool.release(blocks)
    pool.allocate(2)
    assert pool.peak_blocks == 5


NAMES = [bytes([index]) * 16 for index in range(12)]


def test_published_blocks_are_found_after_their_last_owner_has_gone() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    pool.publish(blocks[:2], NAMES[:2])
    pool.release(blocks)
    assert (pool.num_free, pool.num_cached) == (4, 2)
    assert pool.find(NAMES) == blocks[:2]
    assert pool.find([NAMES[5], *NAMES]) == [], "a run begins with the first name"
    pool.retain(pool.find(NAMES))
    assert (pool.num_free, pool.num_cached) == (2, 0)
    pool.release(blocks[:2])
    pool.check()


def test_the_longest_unused_goes_first_and_a_prefix_outlives_what_follows_it() -> None:
    pool = BlockPool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    pool.publish(old, NAMES[:2])
    pool.publish(new, NAMES[2:4])
    pool.release(old)
    pool.release(new)
    pool.retain(pool.find(NAMES[:2]))  # used again
    pool.release(old)
    assert pool.allocate(1) == [new[1]]
    assert pool.allocate(2) == sorted([new[0], old[1]])
    assert pool.find(NAMES[:2]) == old[:1]
    assert pool.find(NAMES[2:4]) == []


def test_blocks_without_content_are_used_up_before_any_content_is_dropped() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.publish(blocks, NAMES[:2])
    pool.release(blocks)
    pool.allocate(2)
    assert pool.find(NAMES) == blocks
    pool.allocate(2)
    assert pool.find(NAMES) == []


def test_a_second_block_of_the_same_content_gets_no_name() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.publish(first, NAMES[:1])
    pool.publish(second, NAMES[:1])
    pool.release(second)
    pool.release(first)
    assert (pool.find(NAMES), pool.num_cached) == (first, 1)
    pool.check()


@pytest.mark.parametrize(("count", "fits"), [(2, True), (3, False)])
def test_found_blocks_do_not_count_as_room_beside_themselves(count: int, fits: bool) -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.publish(blocks, NAMES[:2])
    pool.release(blocks)
    assert pool.can_allocate(4)
    assert pool.can_allocate(count, pool.find(NAMES)) is fits


def test_what_a_shared_block_holds_cannot_change_nor_what_a_free_one_holds() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.publish(blocks, NAMES[:1])
    pool.publish(blocks, NAMES[:1])
    with pytest.raises(AssertionError, match="cannot change"):
        pool.publish(blocks, NAMES[1:2])
    pool.release(blocks)
    with pytest.raises(AssertionError, match="holds nothing"):
        pool.publish(blocks, NAMES[:1])


def test_changes_are_told_once_and_at_most_so_many_at_a_time() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    pool.publish(blocks, NAMES[:3])
    assert pool.take_changes(2) == (NAMES[:2], [])
    pool.release(blocks)
    pool.allocate(2)  # drops the second and third name, the third before it was told
    added, removed = pool.take_changes(10)
    assert (added, sorted(removed)) == ([], NAMES[1:3])
    assert pool.take_changes(10) == ([], [])


@pytest.mark.parametrize("damage", ["lost", "twice", "owned", "negative", "nameless", "astray", "orphan"])
def test_check_sees_damage(damage: str) -> None:
    pool = BlockPool(5)
    pool.allocate(1)
    idle = pool.allocate(1)
    pool.publish(idle, NAMES[:1])
    pool.release(idle)
    match damage:
        case "lost":
            pool._free.pop()
        case "twice":
            pool._free.append(pool._free[0])
        case "owned":
            pool._free.append(0)
        case "negative":
            pool._references[2] = -1
        case "nameless":
            pool._names[idle[0]] = None
        case "astray":
            pool._holders[NAMES[0]] = 3
        case "orphan":
            pool._holders[NAMES[1]] = 3
    with pytest.raises(AssertionError):
        pool.check()


class PoolMachine(RuleBasedStateMachine):
    """Owners that allocate, fill, publish, find, share and release, against a model of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6)
        self.held: list[list[int]] = []
        self.contents: dict[int, bytes] = {}  # what was last written to each block
        self.told: set[bytes] = set()

    @rule(count=st.integers(0, 4))
    def allocate(self, count: int) -> None:
        assert self.pool.can_allocate(count) == (count <= self.pool.num_free)
        if not self.pool.can_allocate(count):
            return
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert not set(blocks) & {block for owned in self.held for block in owned}, "a taken block"
        for block in blocks:
            self.contents[block] = b"rubbish"
        self.held.append(blocks)

    @rule(index=st.integers(0, 20), first=st.integers(0, 8))
    def fill_and_publish(self, index: int, first: int) -> None:
        if not self.held:
            return
        blocks = self.held[index % len(self.held)]
        if any(self.contents[block] != b"rubbish" for block in blocks):
            return
        names = NAMES[first : first + len(blocks)]
        for block, name in zip(blocks, names, strict=True):
            self.contents[block] = name
        self.pool.publish(blocks, names)

    @rule(first=st.integers(0, 11), count=st.integers(1, 4), needed=st.integers(0, 4))
    def find_and_share(self, first: int, count: int, needed: int) -> None:
        names = NAMES[first : first + count]
        found = self.pool.find(names)
        for block, name in zip(found, names, strict=False):
            assert self.contents[block] == name, "found under a name that it does not hold"
        if self.pool.can_allocate(needed, found):
            self.pool.retain(found)
            self.held.append(found + self.pool.allocate(needed))
            for block in self.held[-1][len(found) :]:
                assert block not in found
                self.contents[block] = b"rubbish"

    @rule(index=st.integers(0, 20))
    def release(self, index: int) -> None:
        if self.held:
            self.pool.release(self.held.pop(index % len(self.held)))

    @rule(limit=st.integers(1, 3))
    def tell(self, limit: int) -> None:
        added, removed = self.pool.take_changes(limit)
        assert len(added) + len(removed) <= limit
        self.told = (self.told | set(added)) - set(removed)

    @invariant()
    def every_block_is_free_or_owned(self) -> None:
        self.pool.check()
        owned = {block for blocks in self.held for block in blocks}
        assert self.pool.num_free == 6 - len(owned)
        assert 0 <= self.pool.num_cached <= self.pool.num_free

    def teardown(self) -> None:
        self.tell(100)
        assert self.told == {name for name in NAMES if self.pool.find([name])}, (
            "the router knows what is here"
        )
        for blocks in self.held:
            self.pool.release(blocks)
        self.pool.check()
        assert self.pool.num_free == 6


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
