"""Page statistics, the tree above them, and their incremental growth."""

from dataclasses import replace

import pytest
import torch

import kvrelay_kernels as kk
from kernel_batches import INTERPRETED, make_batch
from kvrelay_kernels.layout import HOME_OFFSETS, node_home


def test_no_two_coarse_nodes_share_a_home() -> None:
    homes = [node_home(level, node) for level in range(1, len(HOME_OFFSETS)) for node in range(4096 >> level)]
    assert len(homes) == len(set(homes))
    for level in range(1, len(HOME_OFFSETS)):
        assert node_home(level - 1, 4 * 7 + 3) <= node_home(level, 7)


def test_statistics_match_the_keys_of_their_pages_and_nodes(impl: str, working_dtype: torch.dtype) -> None:
    batch = make_batch([(64 * 70 + 5, 0), (64 * 17, 0)], dtype=working_dtype)
    stats = kk.kv_block_stats(batch.kv, impl=impl)
    for sequence, keys in enumerate(batch.keys):
        complete = keys.shape[1] // 64
        for level, pages in ((0, 1), (1, 4), (2, 16), (3, 64)):
            prefix = "coarse_" if level else ""
            for node in range(complete // pages):
                if node_home(level, node) >= complete:
                    continue
                home = batch.kv.block_table[sequence, node_home(level, node)]
                covered = keys[:, node * pages * 64 : (node + 1) * pages * 64]
                torch.testing.assert_close(getattr(stats, prefix + "minimum")[home], covered.amin(1))
                torch.testing.assert_close(getattr(stats, prefix + "maximum")[home], covered.amax(1))
                if level == 0:
                    mean = covered.mean(1)
                    spread = (covered - mean[:, None]).square().sum(-1).mean(-1).sqrt()
                    torch.testing.assert_close(stats.mean[home], mean)
                    torch.testing.assert_close(stats.spread[home], spread)


@pytest.mark.parametrize("step", [1, 63, 64, 65, 300])
def test_appending_equals_building_from_scratch(impl: str, working_dtype: torch.dtype, step: int) -> None:
    if INTERPRETED and step < 63:
        pytest.skip("a thousand launches take the interpreter minutes")
    batch = make_batch([(64 * 18 + 3, 0), (200, 0), (0, 0)], heads=(1, 1), dtype=working_dtype)
    stats = kk.KVBlockStats.empty(batch.kv.k_pages)
    seq_lens = torch.zeros_like(batch.kv.seq_lens)
    while bool((seq_lens < batch.kv.seq_lens).any()):
        grown = torch.minimum(seq_lens + step, batch.kv.seq_lens)
        kv = replace(batch.kv, seq_lens=grown)
        kk.update_kv_block_stats(stats, kv, grown - seq_lens, impl=impl)
        seq_lens = grown
    whole = kk.kv_block_stats(batch.kv, impl=impl)
    for name in ("mean", "minimum", "maximum", "spread", "coarse_minimum", "coarse_maximum"):
        torch.testing.assert_close(getattr(stats, name), getattr(whole, name), equal_nan=True)
