// The `tree` selector for decode, bound by memory: one list for the row of each sequence and KV head. Lists over the
// same pages (of heads that have their own, see selecting.h) are scored together, block by block, so that a block's
// keys come from memory once.
#pragma once
#include "tree_selection.h"

namespace {

constexpr int64_t kPieceTiles = 96;  // that a task scores: what a list gets does not depend on it

// A list in the making: its blocks, and peaks and sums of its heads in each.
template <class T>
struct RowList {
  TreeGroup<T> group;
  int64_t row;  // among the lists
  Blocks blocks = {};
  std::vector<float> queries = {}, peaks = {}, sums = {};
};

// A block that a list scores: `index` among its own.
struct RowTile {
  int64_t block;
  size_t list, index;
};

inline bool have_same_pages(const Sequence &a, const Sequence &b) {
  return a.num_tokens == b.num_tokens && std::equal(a.table, a.table + a.num_pages(), b.table);
}

// Sequences of the batch that have a row, those over the same pages together.
inline std::vector<std::vector<int64_t>> sequences_by_pages(const PagedKV &kv) {
  std::vector<std::vector<int64_t>> found;
  for (int64_t b = 0; b < kv.batch; ++b) {
    const Sequence own = sequence_of(kv, nullptr, b);
    if (!own.q_len) continue;
    const auto same = std::find_if(found.begin(), found.end(), [&](const auto &others) {
      return have_same_pages(sequence_of(kv, nullptr, others.front()), own);
    });
    if (same == found.end()) found.push_back({b});
    else same->push_back(b);
  }
  return found;
}

template <class T>
void score_piece(std::vector<RowList<T>> &lists, const std::vector<RowTile> &tiles, size_t first, size_t last,
                 int padded, int head_dim) {
  const auto keys_of = [&](size_t i) { return lists[tiles[i].list].group.keys_of(tiles[i].block); };
  for (size_t i = first, next = first; i < last; i = next) {
    while (next < last && keys_of(next) == keys_of(i)) ++next;  // those up to there read the same keys
    Ahead<T> ahead;
    if (next < last)
      ahead = {keys_of(next), keys_of(next) + kBlock * head_dim, head_dim / int64_t(next - i) + 1};
    for (size_t tile = i; tile < next; ++tile) {
      RowList<T> &list = lists[tiles[tile].list];
      const size_t at = tiles[tile].index * padded;
      list.group.row_masses(list.queries.data(), tiles[tile].block, ahead, &list.peaks[at], &list.sums[at]);
    }
  }
}

template <class T>
void select_by_row(const PagedKV &kv, const Queries &queries, const Stats &stats, TreeConfig config,
                   const Lists &lists) {
  config.sibling_blocks = 1;
  const int padded = padded_lanes(queries.num_q_heads / kv.num_kv_heads);
  std::vector<RowList<T>> rows;
  std::vector<size_t> ends;  // of the lists that read the same keys
  for (const std::vector<int64_t> &alike : sequences_by_pages(kv))
    for (int head = 0; head < kv.num_kv_heads; ++head) {
      for (const int64_t b : alike) {
        const Sequence s = sequence_of(kv, nullptr, b);
        rows.push_back({TreeGroup<T>(kv, queries, stats, config, s, head, s.offset(), 1),
                        lists.cu_q_blocks[b] * int64_t(kv.num_kv_heads) + head});
      }
      ends.push_back(rows.size());
    }
  parallel_for(int64_t(rows.size()), kv.num_threads, [&](int64_t i) {
    RowList<T> &list = rows[size_t(i)];
    list.blocks = list.group.blocks_to_rank(), list.queries = list.group.row_queries();
    list.peaks.assign(list.blocks.size() * padded, 0.0f);
    list.sums.assign(list.blocks.size() * padded, 1.0f);  // of lanes without a head: nothing comes of them
  });
  std::vector<RowTile> tiles;
  for (size_t list = 0, set = 0; set < ends.size(); ++set) {
    const size_t first = tiles.size();
    for (; list < ends[set]; ++list)
      for (size_t index = 0; index < rows[list].blocks.size(); ++index)
        tiles.push_back({rows[list].blocks[index], list, index});
    std::stable_sort(tiles.begin() + int64_t(first), tiles.end(),
                     [](const RowTile &a, const RowTile &b) { return a.block < b.block; });
  }
  const int64_t num_tiles = int64_t(tiles.size());
  parallel_for((num_tiles + kPieceTiles - 1) / kPieceTiles, kv.num_threads, [&](int64_t piece) {
    score_piece(rows, tiles, size_t(piece * kPieceTiles), size_t(std::min((piece + 1) * kPieceTiles, num_tiles)), padded,
                kv.head_dim);
  });
  parallel_for(int64_t(rows.size()), kv.num_threads, [&](int64_t i) {
    RowList<T> &list = rows[size_t(i)];
    lists.counts[list.row] = list.group.keep_by_row(list.blocks, list.peaks.data(), list.sums.data(),
                                                    lists.indices + list.row * config.budget);
  });
}

}  // namespace
