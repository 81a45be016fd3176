"""Names of KV blocks: fixed for ever, one per full block, equal exactly when everything that matters is."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay import SamplingParams
from kvrelay.cache import prefix
from kvrelay.cache.prefix import HASH_BYTES, Prefixes, block_hashes
from kvrelay.router.policies import Load
from kvrelay.types import BLOCK_SIZE, WorkerId

TOKENS = [token * 7 % 1009 for token in range(300)]


@pytest.mark.parametrize(
    ("num_tokens", "count"), [(0, 0), (1, 0), (63, 0), (64, 1), (65, 1), (128, 2), (300, 4)]
)
def test_only_full_blocks_have_names(num_tokens: int, count: int) -> None:
    names = block_hashes(TOKENS[:num_tokens], "layout")
    assert names == block_hashes(TOKENS, "layout")[:count], "what follows changes no name"
    assert all(len(name) == HASH_BYTES for name in names)


def test_names_are_the_same_in_every_process_and_release() -> None:
    """A router, a worker and a file written last year must mean the same block by a name."""
    expected = [name.hex() for name in block_hashes(range(128), "layout", "tenant")]
    assert expected == ["26a2751ab779ffb373b11d171795a363", "f9f5568800ea9cb2e9ad4195ee5c23f6"]
    code = (
        "from kvrelay.cache.prefix import block_hashes;"
        "print(*[name.hex() for name in block_hashes(range(128), 'layout', 'tenant')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected


@pytest.mark.parametrize("changed", [0, 63, 64, 127, 191])
def test_a_changed_token_renames_its_block_and_all_after_it(changed: int) -> None:
    other = list(TOKENS)
    other[changed] += 1
    same = [a == b for a, b in zip(block_hashes(TOKENS, "x"), block_hashes(other, "x"), strict=True)]
    assert same == [index < changed // BLOCK_SIZE for index in range(4)]


def test_tenants_and_layouts_share_no_name() -> None:
    settings = [("a", None), ("b", None), ("a", "b"), ("ab", None), ("", "ab"), ("a", "c"), ("a", "None")]
    names = [name for namespace, salt in settings for name in block_hashes(TOKENS, namespace, salt)]
    assert len(set(names)) == len(names)


def test_kv_of_another_selection_has_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that an earlier version left are found by what is computed alike, and by nothing else."""

    def names(attention: str) -> list[bytes]:
        return Prefixes("layout", attention).names(SamplingParams(), TOKENS, len(TOKENS))

    dense, sparse = names("dense"), names("sparse")
    monkeypatch.setattr(prefix, "SELECTION", prefix.SELECTION + 1)
    assert names("dense") == dense
    assert sparse
    assert not set(names("sparse")) & set(sparse)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=64, max_size=140), st.integers(0, 139))
def test_equal_names_mean_equal_prefixes(tokens: list[int], cut: int) -> None:
    other = [*tokens[:cut], *[token ^ 1 for token in tokens[cut:]]]
    for mine, theirs in zip(block_hashes(tokens, "x"), block_hashes(other, "x"), strict=True):
        index = block_hashes(tokens, "x").index(mine)
        end = (index + 1) * BLOCK_SIZE
        assert (mine == theirs) == (tokens[:end] == other[:end])


def test_the_router_knows_what_a_worker_has_cached() -> None:
    load = Load(WorkerId("w"))
    first, second, third = block_hashes(TOKENS, "x")[:3]
    load.change_cached(added=[first, second], removed=[])
    load.change_cached(added=[third], removed=[first, b"never heard of"])
    assert load.cached == {second, third}
