"""BlockPool: reference counts, the free list, and the integrity check that must see what is wrong."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


@pytest.mark.parametrize("damage", ["lost", "twice", "owned", "negative"])
def test_check_sees_damage(damage: str) -> None:
    pool = BlockPool(3)
    pool.allocate(1)
    match damage:
        case "lost":
            pool._free.pop()
        case "twice":
            pool._free.append(pool._free[0])
        case "owned":
            pool._free.append(0)
        case "negative":
            pool._references[2] = -1
    with pytest.raises(AssertionError):
        pool.check()


@given(
    st.lists(st.tuples(st.sampled_from(["allocate", "retain", "release"]), st.integers(0, 4)), max_size=60)
)
def test_pool_agrees_with_a_multiset(operations: list[tuple[str, int]]) -> None:
    pool, owners, held = BlockPool(6), Counter[int](), list[list[int]]()
    for name, number in operations:
        if name == "allocate" and pool.can_allocate(number):
            blocks = pool.allocate(number)
            assert len(set(blocks)) == number
            assert not any(owners[block] for block in blocks), "a taken block was handed out"
            owners.update(blocks)
            held.append(blocks)
        elif name == "retain" and held:
            blocks = held[number % len(held)]
            pool.retain(blocks)
            owners.update(blocks)
            held.append(blocks)
        elif name == "release" and held:
            blocks = held.pop(number % len(held))
            pool.release(blocks)
            owners.subtract(blocks)
        pool.check()
        assert pool.num_free == 6 - sum(count > 0 for count in owners.values())
    for blocks in held:
        pool.release(blocks)
    pool.check()
    assert pool.num_free == 6
