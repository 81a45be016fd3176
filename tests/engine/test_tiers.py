"""KV that outlives its pages: bounded tiers, files whole or missing, the same tokens."""

import errno
import fcntl
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kvrelay import LLM, EngineConfig, SparseAttention
from kvrelay.cache import file_tier
from kvrelay.cache.file_tier import DIGEST_BYTES, LOCK, MAGIC, FileTier
from kvrelay.cache.memory import memory_bytes
from kvrelay.cache.pool import BlockPool
from kvrelay.cache.store import KVStore
from kvrelay.cache.tiers import Content, HostTier, Tiers
from kvrelay.errors import InvalidConfig, KVRelayError
from kvrelay.types import KVLayout
from kvrelay.worker import loading
from kvrelay.worker.backing import PageBacking
from kvrelay.worker.loop import Worker
from kvrelay.worker.prefill import PrefillSide
from tiny_engine import assert_all_blocks_home, greedy, prompts, tiny_llm

NAMES = [bytes([index]) * 16 for index in range(12)]
HEADER = len(MAGIC) + DIGEST_BYTES
BLOCK_BYTES = 4 * 2 * 2 * 64 * 16 * 4  # of the tiny model in float32


def content(index: int, size: int = 100) -> bytes:
    return bytes([index]) * size


def files_of(directory: Path) -> list[Path]:
    """What lies in a tier's folder beside its lock."""
    return [path for path in directory.iterdir() if path.name != LOCK]


def test_the_host_tier_keeps_the_last_used_and_hands_on_the_others() -> None:
    tier = HostTier(300)
    for index in range(3):
        assert tier.put(NAMES[index], content(index)) == []
    assert tier.put(NAMES[0], content(0)) == [], "what is here already takes no room twice"
    assert tier.put(NAMES[3], content(3)) == [(NAMES[1], content(1))]
    assert tier.get(NAMES[0]) == content(0)
    assert tier.put(NAMES[4], content(4)) == [(NAMES[0], content(0))], "whoever read it has it"
    assert tier.num_bytes == 300
    assert tier.put(NAMES[5], content(5, 301))[-1] == (NAMES[5], content(5, 301)), "it never fits"
    assert tier.num_bytes <= 300


def test_files_are_found_again_by_the_next_process(tmp_path: Path) -> None:
    tier = FileTier(tmp_path / "kv", 10_000)
    tier.put(NAMES[0], content(7))
    assert tier.wait(5.0)
    tier.close()
    (tmp_path / "kv" / "left.partial").write_bytes(b"half")
    (tmp_path / "kv" / "foreign.kvblock").write_bytes(b"not one of ours")
    again = FileTier(tmp_path / "kv", 10_000)
    assert list(again) == [NAMES[0]]
    assert again.get(NAMES[0]) == content(7)
    assert again.get(NAMES[1]) is None
    assert again.num_bytes == HEADER + 100
    assert not list((tmp_path / "kv").glob("*.partial"))


@pytest.mark.parametrize("damage", ["bit", "short", "long", "empty", "other name", "gone", "magic"])
def test_a_damaged_file_is_missing_and_deleted(tmp_path: Path, damage: str) -> None:
    tier = FileTier(tmp_path, 10_000)
    tier.put(NAMES[0], content(0))
    tier.put(NAMES[1], content(1))
    assert tier.wait(5.0)
    path = tmp_path / f"{NAMES[0].hex()}.kvblock"
    data = bytearray(path.read_bytes())
    match damage:
        case "bit":
            data[HEADER + 50] ^= 1
        case "short":
            del data[-1]
        case "long":
            data += b"x"
        case "empty":
            data.clear()
        case "other name":
            data[:] = (tmp_path / f"{NAMES[1].hex()}.kvblock").read_bytes()
        case "magic":
            data[0] ^= 1
    path.write_bytes(data)
    if damage == "gone":
        path.unlink()
    assert tier.get(NAMES[0]) is None
    assert tier.get(NAMES[0]) is None
    assert not path.exists()
    assert NAMES[0] not in tier
    assert tier.get(NAMES[1]) == content(1)
    tier.close()


def test_the_file_tier_stays_within_its_bytes(tmp_path: Path) -> None:
    limit = 3 * (HEADER + 100)
    tier = FileTier(tmp_path, limit)
    for index in range(6):
        assert tier.put(NAMES[index], content(index)) == ([(NAMES[index - 3], b"")] if index > 2 else [])
        assert tier.wait(5.0)
        assert sum(path.stat().st_size for path in files_of(tmp_path)) == tier.num_bytes <= limit
    assert [tier.get(name) is not None for name in NAMES[:6]] == [False] * 3 + [True] * 3
    assert tier.put(NAMES[6], content(6, 10_000)) == [(NAMES[6], content(6, 10_000))]
    assert tier.get(NAMES[6]) is None
    tier.close()
    smaller = FileTier(tmp_path, limit // 3)
    assert smaller.num_bytes == limit // 3, "a smaller limit shrinks what is there"
    assert smaller.wait(5.0)
    assert [path.stem for path in files_of(tmp_path)] == [NAMES[5].hex()]


def read_only(path: Path, missing_ok: bool = False) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


def held_up(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> tuple[threading.Event, threading.Event]:
    """A function that says when it is called, by the first event, and waits for the second."""
    is_called, may_go_on, function = threading.Event(), threading.Event(), getattr(owner, name)

    def slow(*arguments: Any, **named: Any) -> None:
        is_called.set()
        may_go_on.wait(10.0)
        function(*arguments, **named)

    monkeypatch.setattr(owner, name, slow)
    return is_called, may_go_on


def test_a_block_is_found_before_it_is_written_and_a_slow_disk_costs_blocks_not_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_writing, may_write = held_up(monkeypatch, file_tier, "_write")
    monkeypatch.setattr(file_tier, "MAX_UNWRITTEN_BYTES", 250)
    tier = FileTier(tmp_path, 10_000)
    assert tier.put(NAMES[0], content(0)) == []
    assert is_writing.wait(5.0)
    assert tier.put(NAMES[1], content(1)) == []
    assert tier.put(NAMES[2], content(2)) == [(NAMES[2], content(2))]
    assert [tier.get(name) for name in NAMES[:3]] == [content(0), content(1), None]
    assert not tier.wait(0.01)
    assert not list(tmp_path.glob("*.kvblock"))
    may_write.set()
    assert tier.wait(5.0)
    assert tier.put(NAMES[2], content(2)) == []
    assert tier.wait(5.0)
    assert len(list(tmp_path.glob("*.kvblock"))) == 3
    tier.close()


def test_a_file_that_grew_is_missing_and_no_memory_is_taken_for_it(tmp_path: Path) -> None:
    tier = FileTier(tmp_path, 10_000)
    tier.put(NAMES[0], content(0))
    assert tier.wait(5.0)
    (path,) = files_of(tmp_path)
    os.truncate(path, 2**40)  # a hole, larger than any memory
    assert tier.get(NAMES[0]) is None
    assert not path.exists()
    tier.close()


def test_a_block_dropped_before_it_was_written_leaves_no_file(tmp_path: Path) -> None:
    tier = FileTier(tmp_path, HEADER + 100)
    for _ in range(20):
        for index in range(4):
            tier.put(NAMES[index], content(index))
    assert tier.wait(5.0)
    assert [path.stem for path in files_of(tmp_path)] == [NAMES[3].hex()]
    assert tier.get(NAMES[3]) == content(3)
    tier.close()


def test_blocks_dropped_unwritten_do_not_count_as_unwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, may_write = held_up(monkeypatch, file_tier, "_write")
    monkeypatch.setattr(file_tier, "MAX_UNWRITTEN_BYTES", 250)
    tier = FileTier(tmp_path, HEADER + 100)
    tier.put(NAMES[0], content(0))
    for _ in range(5):
        for index in (1, 0):
            assert tier.put(NAMES[index], content(index)) == [(NAMES[1 - index], b"")]
    may_write.set()
    assert tier.wait(5.0)
    assert tier.get(NAMES[0]) == content(0)
    tier.close()


def test_a_block_that_comes_back_while_its_file_is_deleted_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = FileTier(tmp_path, HEADER + 100)
    tier.put(NAMES[0], content(0))
    assert tier.wait(5.0)
    is_deleting, may_delete = held_up(monkeypatch, Path, "unlink")
    tier.put(NAMES[1], content(1))
    assert is_deleting.wait(5.0)
    assert tier.put(NAMES[0], content(0)) == [(NAMES[1], b"")]
    may_delete.set()
    assert tier.wait(5.0)
    assert tier.get(NAMES[0]) == content(0)
    assert [path.stem for path in files_of(tmp_path)] == [NAMES[0].hex()]
    tier.close()


def test_a_block_that_comes_back_while_its_file_cannot_be_deleted_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = FileTier(tmp_path, HEADER + 100)
    tier.put(NAMES[0], content(0))
    assert tier.wait(5.0)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", read_only)
        is_deleting, may_fail = held_up(patch, Path, "unlink")
        tier.put(NAMES[1], content(1))
        assert is_deleting.wait(5.0)
        tier.put(NAMES[0], content(0))
        may_fail.set()
        assert tier.wait(5.0)
    assert tier.get(NAMES[0]) == content(0)
    assert tier.num_bytes == HEADER + 100
    tier.close()


def test_a_directory_that_fills_up_or_goes_costs_blocks_only(tmp_path: Path) -> None:
    tier = FileTier(tmp_path / "kv", 10_000)
    shutil.rmtree(tmp_path / "kv")
    tier.put(NAMES[0], content(0))
    assert tier.wait(5.0)
    assert NAMES[0] not in tier
    assert tier.get(NAMES[0]) is None
    tier.close()


def test_a_directory_that_cannot_be_made_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidConfig, match="kv_file_directory"):
        FileTier(tmp_path / "file" / "kv", 1000)


def test_a_directory_in_use_is_refused_until_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two would each keep to the limit, and both together to twice as much."""
    monkeypatch.setattr(file_tier, "LOCK_WAIT_S", 0.1)
    first = FileTier(tmp_path, 1000)
    with pytest.raises(InvalidConfig, match=r"kv_file_directory=.*: another engine uses it"):
        FileTier(tmp_path, 1000)
    first.close()
    first.close()
    FileTier(tmp_path, 1000).close()


def test_a_directory_that_is_let_go_meanwhile_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a worker that writes its last blocks although its engine was killed."""
    first = FileTier(tmp_path, 1000)
    monkeypatch.setattr(file_tier.time, "sleep", lambda seconds: first.close())
    FileTier(tmp_path, 1000).close()


def test_what_is_locked_is_open_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over NFS nothing else can be."""
    modes: list[int] = []
    flock = fcntl.flock

    def noted(opened: int, how: int) -> None:
        modes.append(fcntl.fcntl(opened, fcntl.F_GETFL) & os.O_ACCMODE)
        flock(opened, how)

    monkeypatch.setattr(file_tier.fcntl, "flock", noted)
    FileTier(tmp_path, 1000).close()
    assert modes == [os.O_RDWR]


def test_a_directory_that_cannot_be_tidied_is_refused_and_let_go(tmp_path: Path) -> None:
    (tmp_path / "x.partial").mkdir()
    for _ in range(2):
        with pytest.raises(InvalidConfig, match=r"kv_file_directory=.*: .*x\.partial"):
            FileTier(tmp_path, 1000)
    (tmp_path / "x.partial").rmdir()
    FileTier(tmp_path, 1000).close()


def test_a_full_disk_leaves_no_half_file_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_full_disk(suffix: str, dir: Path) -> tuple[int, str]:
        partial = dir / f"x{suffix}"
        partial.write_bytes(b"")
        return os.open("/dev/full", os.O_WRONLY), str(partial)

    tier = FileTier(tmp_path, 10_000)
    with monkeypatch.context() as patch:
        patch.setattr(file_tier.tempfile, "mkstemp", on_full_disk)
        tier.put(NAMES[0], content(0))
        assert tier.wait(5.0)
    assert not files_of(tmp_path)
    assert (tier.get(NAMES[0]), tier.num_bytes) == (None, 0)
    tier.put(NAMES[0], content(0))
    assert tier.wait(5.0)
    assert tier.get(NAMES[0]) == content(0), "there is room again"
    tier.close()


def test_a_damaged_file_that_cannot_be_deleted_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = FileTier(tmp_path, 10_000)
    tier.put(NAMES[0], content(0))
    assert tier.wait(5.0)
    (path,) = files_of(tmp_path)
    path.write_bytes(b"x" * path.stat().st_size)
    monkeypatch.setattr(Path, "unlink", read_only)
    assert tier.get(NAMES[0]) is None
    assert NAMES[0] not in tier
    assert tier.num_bytes == 0
    tier.close()


def test_what_is_no_file_is_no_block(tmp_path: Path) -> None:
    (tmp_path / f"{NAMES[0].hex()}.kvblock").mkdir()
    tier = FileTier(tmp_path, 10_000)
    assert tier.num_bytes == 0
    assert tier.get(NAMES[0]) is None
    tier.close()


def test_what_host_memory_drops_goes_to_files_and_a_run_ends_where_one_is_missing(tmp_path: Path) -> None:
    counters: Counter[str] = Counter()
    tiers = Tiers([HostTier(200), FileTier(tmp_path, 10_000)], counters)
    for index in range(4):
        tiers.put(NAMES[index], content(index))
    assert list(tiers.get(NAMES[:6], 100)) == [content(index) for index in range(4)]
    assert counters == {"tier_hits_host": 2, "tier_hits_file": 2}
    assert list(tiers.get([NAMES[5], NAMES[0]], 100)) == []
    assert list(tiers.get(NAMES[:2], 99)) == [], "contents of another size are not ours"


def test_names_are_lost_with_their_last_copy(tmp_path: Path) -> None:
    tiers = Tiers([HostTier(200), FileTier(tmp_path, 2 * (HEADER + 100))], Counter())
    lost = [tiers.put(NAMES[index], content(index)) for index in range(6)]
    assert lost == [[], [], [], [], [NAMES[0]], [NAMES[1]]]
    assert tiers.names() == set(NAMES[2:6])
    assert list(tiers.settle()) == NAMES[4:6]
    assert tiers.names() == set(NAMES[4:6])
    assert Tiers([HostTier(50)], Counter()).put(NAMES[0], content(0)) == [NAMES[0]]


def pool_names(pool: BlockPool) -> set[bytes]:
    return set(pool._holders)


class Memory:
    """A backing over a list of cells, with real tiers."""

    def __init__(self, num_blocks: int, max_bytes: int) -> None:
        self.cells: list[bytes] = [b"rubbish"] * num_blocks
        self.tiers = Tiers([HostTier(max_bytes)], Counter())
        self.unwritten = self.most_unwritten = 0
        self.completed: list[tuple[list[int], int]] = []

    def save(self, name: bytes, block: int) -> list[bytes]:
        return self.tiers.put(name, self.cells[block])

    def names(self) -> set[bytes]:
        return self.tiers.names()

    def fetch(self, names: Any) -> Iterator[Content]:
        for data in self.tiers.get(names, 16):
            self.unwritten += 1
            self.most_unwritten = max(self.most_unwritten, self.unwritten)
            yield data

    def fill(self, block: int, content: Content) -> None:
        self.unwritten -= 1
        self.cells[block] = bytes(content)

    def complete(self, blocks: Any, num_filled: int) -> None:
        self.completed.append((list(blocks), num_filled))

    def close(self, held: Any) -> None:
        for name, block in held:
            self.save(name, block)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5), st.integers(0, 3)), max_size=30),
    st.sampled_from([0, 32, 64, 1000]),
    st.sampled_from([1, 2]),
)
def test_full_blocks_hold_what_their_names_say_whatever_was_evicted(
    sequences: list[tuple[int, int, int]], max_bytes: int, multiple: int
) -> None:
    memory = Memory(8, max_bytes)
    pool = BlockPool(8, memory)
    held: list[list[int]] = []
    told: set[bytes] = set()
    for text, count, num_kept in sequences:
        names = [bytes([text, index]) * 8 for index in range(count)]
        while len(held) > num_kept:
            pool.release(held.pop(0))
        if not pool.can_allocate(count - len(found := pool.find(names, multiple)), found):
            continue
        blocks, num_full = pool.take(names, count, multiple)
        assert len(set(blocks)) == count
        assert num_full % multiple == 0
        assert num_full >= len(found)
        assert [memory.cells[block] for block in blocks[:num_full]] == names[:num_full]
        for block, name in zip(blocks[num_full:], names[num_full:], strict=True):
            memory.cells[block] = name
        pool.publish(blocks, names)
        held.append(blocks)
        pool.check()
        added, removed = pool.take_changes(100)
        told = (told | set(added)) - set(removed)
        assert told == memory.tiers.names() | pool_names(pool), "what can be found is what others are told"
    for blocks in held:
        pool.release(blocks)
    pool.check()
    assert pool.num_free == 8
    before = pool_names(pool)
    pool.close()
    assert max_bytes < 1000 or before <= memory.tiers.names()


def test_a_pools_worth_of_blocks_changes_places_with_as_many_in_a_tier_one_by_one() -> None:
    """What is given up for blocks that come back does not push those out that have yet to come."""
    memory = Memory(4, 4 * 16)
    pool = BlockPool(4, memory)
    texts = [[bytes([text, index]) * 8 for index in range(4)] for text in range(2)]
    for turn in range(6):
        names = texts[turn % 2]
        blocks, num_full = pool.take(names, 4)
        assert num_full == (4 if turn > 1 else 0)
        for block, name in zip(blocks[num_full:], names[num_full:], strict=True):
            memory.cells[block] = name
        assert [memory.cells[block] for block in blocks] == names
        pool.publish(blocks, names)
        pool.release(blocks)
    assert memory.most_unwritten == 1, "however long the prefix, one content is in memory for it"
    assert [num_filled for _, num_filled in memory.completed] == [4] * 4


def test_blocks_of_a_unit_that_cannot_be_made_whole_are_not_shared() -> None:
    memory = Memory(8, 1000)
    pool = BlockPool(8, memory)
    blocks, _ = pool.take([], 2)
    pool.publish(blocks, NAMES[:2])
    memory.tiers.put(NAMES[2], content(2, 16))
    taken, num_full = pool.take(NAMES[:6], 6, 4)
    assert num_full == 0
    assert not set(taken) & set(blocks)
    assert pool.num_free == 0
    memory.tiers.put(NAMES[3], content(3, 16))
    pool.release(taken)
    taken, num_full = pool.take(NAMES[:6], 6, 4)
    assert (taken[:2], num_full) == (blocks, 4)
    assert memory.completed == [(taken[:4], 2)]
    pool.release(taken)
    pool.release(blocks)
    pool.check()
    assert pool.num_free == 8


def test_what_an_earlier_process_left_is_news_at_first() -> None:
    memory = Memory(2, 1000)
    memory.tiers.put(NAMES[0], content(0, 16))
    assert BlockPool(2, memory).take_changes(100) == ([NAMES[0]], [])


def test_blocks_come_back_with_the_statistics_that_they_left_with() -> None:
    layout = KVLayout(model="m", dtype="float32", num_layers=2, num_kv_heads=2, head_dim=8)
    buffer = memoryview(bytearray(memory_bytes(layout, 12, keeps_stats=True)))
    store = KVStore(layout, 12, buffer, torch.device("cpu"), keeps_stats=True)
    backing = PageBacking(store, Tiers([HostTier(10**9)], Counter()))
    store.pages.normal_()
    store.refresh_stats(range(4), 256)
    for name, block in zip(NAMES, range(4), strict=False):
        backing.save(name, block)
    calls: list[None] = []
    backing.after_each = lambda: calls.append(None)
    for names, blocks, num_new in ((NAMES[:6], [4, 5, 6, 7], 4), (NAMES[2:4], [0, 1, 8, 9], 2)):
        for block, data in zip(blocks[-num_new:], backing.fetch(names), strict=True):
            backing.fill(block, data)
        for layer in range(2) if num_new == 2 else ():
            store.memory.vectors[layer, 0, 0] = 7.0  # shared: nobody's to compute anew
        backing.complete(blocks, num_new)
    assert len(calls) == 6
    assert (store.memory.vectors[:, 0, 0] == 7.0).all()
    store.refresh_stats([0], 64)
    for stored in store.memory.tensors:
        blocks = stored if stored.dim() == 3 else stored.transpose(1, 2)
        assert torch.equal(blocks[:, 4:8].nan_to_num(), blocks[:, :4].nan_to_num())
        assert torch.equal(blocks[:, 8:10].nan_to_num(), blocks[:, 2:4].nan_to_num())
    assert store.memory.vectors[:, :3, 4:10].isfinite().all()
    assert store.memory.vectors[:, 3:, [7, 9]].isfinite().all(), "the node of four blocks lies in the last"


def talk(llm: LLM, turns: int) -> tuple[list[list[int]], list[int]]:
    """Two conversations in turn on a pool that holds one: tokens, and what the first found again."""
    texts, tokens, cached = [prompts(400, 401)[index] for index in range(2)], [], []
    for _ in range(turns):
        for text in texts:
            (output,) = llm.generate([text], greedy(20))
            tokens.append(output.token_ids)
            cached.append(output.num_cached_tokens)
            text += output.token_ids + [9] * 10
    return tokens, cached


def hits(llm: LLM, tier: str) -> list[int]:
    return [worker.counters.get(f"tier_hits_{tier}", 0) for worker in llm.report().workers]


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize("mode", ["colocated", "disaggregated"])
@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_conversations_come_back_from_the_tiers_with_the_same_tokens(
    tiny_directory: Path, tmp_path: Path, mode: str, attention: str
) -> None:
    chosen = SparseAttention(budget_tokens=192, local_blocks=1, dense_below_tokens=0, candidate_tokens=0)
    common: dict[str, Any] = {"mode": mode, "attention": chosen if attention == "sparse" else "dense"}
    with tiny_llm(tiny_directory, **common, prefix_cache=False) as llm:
        expected, _ = talk(llm, 3)
    tiers = {
        "host": {"kv_host_bytes": 100 * BLOCK_BYTES},
        "file": {"kv_file_bytes": 100 * (BLOCK_BYTES + HEADER), "kv_file_directory": str(tmp_path)},
    }
    for tier, sizes in tiers.items():
        with tiny_llm(tiny_directory, num_kv_blocks=10, **common, **sizes) as llm:
            tokens, cached = talk(llm, 3)
            assert_all_blocks_home(llm)
            assert all(hits(llm, tier))
        assert tokens == expected
        assert cached[:2] == [0, 0]
        assert all(found >= 256 for found in cached[2:])


def test_what_a_worker_held_is_found_by_the_next_one(tiny_directory: Path, tmp_path: Path) -> None:
    """Blocks that never left their pages, and those in host memory, are in files once an engine is closed."""
    text = prompts(400)[0]
    sizes: dict[str, Any] = {
        "mode": "colocated",
        "kv_host_bytes": 100 * BLOCK_BYTES,
        "kv_file_bytes": 100 * (BLOCK_BYTES + HEADER),
        "kv_file_directory": str(tmp_path),
    }
    with tiny_llm(tiny_directory, **sizes) as llm:
        (first,) = llm.generate([text], greedy(20))
    with tiny_llm(tiny_directory, **sizes, policy="prefix_aware") as llm:
        (again,) = llm.generate([text], greedy(20))
    assert again.token_ids == first.token_ids
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 384)


def test_a_fine_tune_of_equal_shapes_does_not_find_what_the_original_left(
    tiny_directory: Path, tmp_path: Path
) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(tiny_directory, tuned)
    weights = load_file(tuned / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.2
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    sizes: dict[str, Any] = {"kv_file_bytes": 10**8, "kv_file_directory": str(tmp_path / "kv")}
    outputs = []
    for directory, own in ((tiny_directory, sizes), (tuned, {}), (tuned, sizes), (tuned, sizes)):
        with tiny_llm(directory, mode="colocated", **own) as llm:
            outputs += llm.generate(prompts(400), greedy(20))
    original, alone, first, again = (output.token_ids for output in outputs)
    assert alone == first == again != original
    assert [output.num_cached_tokens for output in outputs] == [0, 0, 0, 384]


def test_a_worker_shows_life_between_blocks_that_come_back(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that takes longer than a lease for a long prefix costs no lease that the worker holds."""
    events: list[str] = []

    def noted(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            events.append(name)
            return function(*arguments, **named)

        monkeypatch.setattr(owner, name, call)

    sizes: dict[str, Any] = {"kv_file_bytes": 10**8, "kv_file_directory": str(tmp_path)}
    with tiny_llm(tiny_directory, mode="colocated", **sizes) as llm:
        llm.generate(prompts(400), greedy(4))
    for owner, name in ((file_tier, "_read"), (PrefillSide, "renew"), (Worker, "_beat")):
        noted(owner, name)
    with tiny_llm(tiny_directory, mode="colocated", **sizes) as llm:
        (output,) = llm.generate(prompts(400), greedy(4))
    assert output.num_cached_tokens == 384
    reads = [index for index, event in enumerate(events) if event == "_read"]
    between = [events[first + 1 : second] for first, second in pairwise(reads)]
    assert between == [["renew", "_beat"]] * 5


def test_an_engine_whose_worker_raised_can_be_replaced(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(side: PrefillSide, num_decoded: int = 0) -> bool:
        if len(side):
            raise ZeroDivisionError("a bug of ours")
        return False

    monkeypatch.setattr(file_tier, "LOCK_WAIT_S", 0.1)
    sizes: dict[str, Any] = {"kv_file_bytes": 10**8, "kv_file_directory": str(tmp_path)}
    with monkeypatch.context() as patch:
        patch.setattr(PrefillSide, "step", broken)
        with pytest.raises(KVRelayError), tiny_llm(tiny_directory, mode="colocated", **sizes) as llm:
            llm.generate(prompts(100), greedy(4))
    with tiny_llm(tiny_directory, mode="colocated", **sizes) as llm:
        assert llm.generate(prompts(100), greedy(4))


def test_what_was_computed_under_another_crossover_is_not_found(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` stands for a number that another day's measurement may change, and KV with it."""
    auto = SparseAttention(budget_tokens=256, local_blocks=1)
    sizes: dict[str, Any] = {
        "kv_file_bytes": 100 * (BLOCK_BYTES + HEADER),
        "kv_file_directory": str(tmp_path),
    }
    found = []
    for dense_below, own in ((768, sizes), (0, sizes), (0, {}), (0, sizes)):
        monkeypatch.setattr(loading, "measured", lambda *_, n=dense_below: auto.with_crossover(n, n))
        with tiny_llm(tiny_directory, mode="colocated", attention=auto, **own) as llm:
            found += llm.generate(prompts(800), greedy(1, logprobs=0))
    first, second, plain, last = (output.logprobs[0].logprob for output in found)
    assert second == pytest.approx(plain, abs=1e-4)
    assert last == pytest.approx(plain, abs=1e-4)
    assert abs(first - second) > 1e-3, "it was meant to matter"
    assert [output.num_cached_tokens for output in found] == [0, 0, 0, 768]


@pytest.mark.parametrize(
    ("field", "least"), [("kv_host_bytes", BLOCK_BYTES), ("kv_file_bytes", BLOCK_BYTES + HEADER)]
)
def test_a_tier_that_no_block_fits_in_is_refused(
    tiny_directory: Path, tmp_path: Path, field: str, least: int
) -> None:
    settings: dict[str, Any] = {"kv_file_directory": str(tmp_path)} if field == "kv_file_bytes" else {}
    with pytest.raises(InvalidConfig, match=f"{field}={least - 1}: expected 0 or at least {least} bytes"):
        tiny_llm(tiny_directory, **{field: least - 1}, **settings)
    with tiny_llm(tiny_directory, **{field: least}, **settings):
        pass


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kv_host_bytes": -1}, "kv_host_bytes=-1: expected at least 0"),
        ({"kv_host_bytes": 1, "prefix_cache": False}, "kv_host_bytes=1: without prefix_cache"),
        ({"kv_file_bytes": 5}, "kv_file_bytes=5, kv_file_directory=None: expected both or neither"),
        ({"kv_file_directory": "x"}, "kv_file_bytes=0, kv_file_directory='x': expected both"),
    ],
)
def test_bad_tiers_are_refused_by_name(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidConfig, match=reason):
        EngineConfig(model="m", **settings)
