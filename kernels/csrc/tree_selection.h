// The `tree` selector: one task is a sibling group and a KV head. Mean queries walk down the tree of key
// boxes with a beam; the pages they end with are scored exactly by a few sampled rows of each query block;
// each query block keeps its best. Same steps and names as reference/select_blocks_tree.py. Queries lie in
// lanes (see lanes.h), so a box or a key is read once for all siblings, samples and heads.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "block_stats.h"
#include "dot_rows.h"
#include "lanes.h"

namespace {

using Blocks = std::vector<int64_t>;

// Queries that rows are scored by; fill(lane, line[head_dim]) gives each. Transposed into panels, or one by
// one as they are if they would not even fill a vector.
struct LaneTile {
  int lanes, padded, head_dim;
  float *data;

  template <class F>
  LaneTile(int num, int d, float *memory, float *line, F fill)
      : lanes(num), padded(padded_lanes(num)), head_dim(d), data(memory) {
    for (int lane = 0; lane < lanes && few(); ++lane) fill(lane, data + size_t(lane) * d);
    if (few()) return;
    for_each_lane(padded, d, [&](int lane, int base, int stride) {
      std::fill(line, line + d, 0.0f);
      if (lane < lanes) fill(lane, line);
      for (int c = 0; c < d; ++c) data[base + c * stride] = line[c];
    });
  }

  bool few() const { return lanes <= 8; }

  // scores [n, padded] (+)= rows . queries
  template <bool kAdd>
  void score(const Rows &rows, float *scores) const {
    if (few()) return score_few<kAdd>(rows, scores);
    for_each_panel(padded, [&](auto nv, int first) {
      score_panel<decltype(nv)::value, kAdd>(rows, rows.n, data + size_t(first) * head_dim, head_dim,
                                             scores + first, padded);
    });
  }

  template <bool kAdd>
  void score_few(const Rows &rows, float *scores) const {
    if (!kAdd) std::fill(scores, scores + size_t(rows.n) * padded, 0.0f);
    for_each_heads(lanes, [&](auto heads, int first) {
      constexpr int K = 8 / heads;
      const auto add = [&](int i, const float *products) {
        for (int j = 0; j < K && i + j < rows.n; ++j)
          for (int h = 0; h < heads; ++h) scores[(i + j) * padded + first + h] += products[h * K + j];
      };
      dot_rows<heads>(data + size_t(first) * head_dim, head_dim, rows.n, [&](int i) { return rows.at[i]; }, add);
    });
  }
};

inline void keep_top(std::vector<std::pair<float, int64_t>> &scored, size_t count) {
  const auto better = [](const auto &a, const auto &b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  };
  if (scored.size() <= count) return;
  std::nth_element(scored.begin(), scored.begin() + int64_t(count), scored.end(), better);
  scored.resize(count);
}

// Boxes and candidate pages lie apart, so the next ones are asked for while these are scored.
template <class T>
inline void fetch_row(const T *row, int head_dim) {
  for (int c = 0; c < head_dim; c += 64 / int(sizeof(T))) __builtin_prefetch(row + c, 0, 2);
}

template <class T>
class TreeGroup {
 public:
  TreeGroup(const PagedKV &kv, const Queries &queries, const Stats &stats, const TreeConfig &config,
            const Sequence &s, int kv_head, int64_t first_position, int num_rows)
      : kv_(kv),
        queries_(queries),
        stats_(stats),
        config_(config),
        s_(s),
        kv_head_(kv_head),
        d_(kv.head_dim),
        group_(queries.num_q_heads / kv.num_kv_heads),
        first_position_(first_position),
        num_rows_(num_rows),
        num_blocks_((num_rows + 63) / 64),
        first_own_(first_position / 64),
        frontier_(first_own_ / config.sibling_blocks * config.sibling_blocks),
        factor_(queries.scale * kLog2e) {}

  // Lists of each query block, `budget` apart, and their counts, `num_kv_heads` rows apart.
  void select(int32_t *indices, int32_t *counts, int64_t row_stride) {
    const Blocks forced = forced_blocks();
    Blocks blocks = candidates(descend(), forced);
    std::sort(blocks.begin(), blocks.end());
    blocks.insert(blocks.begin(), forced.begin(), forced.end());
    const std::vector<float> shares = rerank(blocks);
    for (int i = 0; i < num_blocks_; ++i)
      counts[i * row_stride] = keep_best(blocks, shares.data() + size_t(i) * blocks.size(), first_own_ + i,
                                         indices + i * row_stride * config_.budget);
  }

 private:
  const T *query(int row, int head) const {
    const int64_t at = s_.first_row + first_position_ - s_.offset() + row;
    return static_cast<const T *>(queries_.q) + at * queries_.q_stride[0] +
           (kv_head_ * group_ + head) * queries_.q_stride[1];
  }

  int rows_in(int block) const { return std::min(64, num_rows_ - block * 64); }
  int64_t last_own() const { return first_own_ + num_blocks_ - 1; }

  Blocks forced_blocks() const {
    Blocks forced(size_t(std::min(config_.sink_blocks, last_own() + 1)));
    std::iota(forced.begin(), forced.end(), 0);
    for (int64_t b = std::max<int64_t>(int64_t(forced.size()), frontier_ - config_.local_blocks + 1);
         b <= last_own(); ++b)
      forced.push_back(b);
    return forced;
  }

  // Beam search from the finest level that fits in the beam; gives pages before the frontier.
  Blocks descend() {
    int level = 0;
    while ((frontier_ + pages_per_node(level) - 1) / pages_per_node(level) > config_.beam && level < kNumLevels - 1)
      ++level;
    Blocks nodes(size_t((frontier_ + pages_per_node(level) - 1) / pages_per_node(level)));
    std::iota(nodes.begin(), nodes.end(), 0);
    for (; level > 0; --level) {
      Blocks children;
      for (const int64_t node : keep_nodes(nodes, level))
        for (int64_t child = node * kFanout; child < (node + 1) * kFanout; ++child)
          if (child * pages_per_node(level - 1) < frontier_) children.push_back(child);
      nodes = std::move(children);
    }
    return nodes;
  }

  // The best nodes, and those at the frontier, which have no box yet.
  Blocks keep_nodes(const Blocks &nodes, int level) {
    Blocks boxed, homes, kept;
    for (const int64_t node : nodes) {
      if (home_of(level, node) < frontier_) {
        boxed.push_back(node);
        homes.push_back(home_of(level, node));
      } else {
        kept.push_back(node);
      }
    }
    if (boxed.size() > size_t(config_.beam)) {
      auto scored = bound_shares(boxed, homes, stats_.coarse_minimum, stats_.coarse_maximum);
      keep_top(scored, size_t(config_.beam));
      boxed.clear();
      for (const auto &[share, node] : scored) boxed.push_back(node);
    }
    kept.insert(kept.end(), boxed.begin(), boxed.end());
    return kept;
  }

  Blocks candidates(const Blocks &pages, const Blocks &forced) {
    Blocks free;
    for (const int64_t page : pages)
      if (std::find(forced.begin(), forced.end(), page) == forced.end()) free.push_back(page);
    auto scored = bound_shares(free, free, stats_.minimum, stats_.maximum);
    keep_top(scored, size_t(config_.num_candidates));
    Blocks kept;
    for (const auto &[share, page] : scored) kept.push_back(page);
    return kept;
  }

  // Softmax over the nodes of the largest logit each box allows, mean over the lanes (Quest, eq. 2).
  std::vector<std::pair<float, int64_t>> bound_shares(const Blocks &nodes, const Blocks &homes, const void *lower,
                                                      const void *upper) {
    std::vector<std::pair<float, int64_t>> shares;
    if (nodes.empty()) return shares;
    pool_queries();
    const int n = int(nodes.size()), padded = padded_lanes(num_blocks_ * group_);
    float *scores = scratch(kMasses, size_t(n) * padded);
    float *half = scratch(kQueries, size_t(padded) * d_), *line = scratch(kState, size_t(d_));
    for (const bool positive : {true, false}) {
      const LaneTile tile(num_blocks_ * group_, d_, half, line, [&](int lane, float *to) {
        for (int c = 0; c < d_; ++c) {
          const float q = pooled_[size_t(lane) * d_ + c];
          to[c] = (q > 0) == positive ? q : 0.0f;
        }
      });
      const auto box = [&](int i) {
        const int64_t row = s_.table[homes[size_t(i)]] * int64_t(kv_.num_kv_heads) + kv_head_;
        return static_cast<const T *>(positive ? upper : lower) + row * d_;
      };
      for (int i = 0; i < std::min(kBlock, n); ++i) fetch_row(box(i), d_);
      for (int first = 0; first < n; first += kBlock) {
        for (int i = first + kBlock; i < std::min(first + 2 * kBlock, n); ++i) fetch_row(box(i), d_);
        Rows rows;
        gather(rows, std::min(kBlock, n - first), d_, scratch(kRowsK, kBlock * d_), [&](int i) { return box(first + i); });
        if (positive)
          tile.template score<false>(rows, scores + size_t(first) * padded);
        else
          tile.template score<true>(rows, scores + size_t(first) * padded);
      }
    }
    softmax_over_rows(scores, n, padded);
    for (int i = 0; i < n; ++i)
      shares.emplace_back(lane_sum(scores + size_t(i) * padded, 0, num_blocks_ * group_), nodes[size_t(i)]);
    return shares;
  }

  // scores [n, padded] become softmax over n, each lane by itself
  void softmax_over_rows(float *scores, int n, int padded) const {
    for (int lane = 0; lane < padded; lane += kLanes) {
      Vec top = Vec{} + kLowest, total = {};
      for (int i = 0; i < n; ++i) top = maximum(top, load<Vec>(scores + size_t(i) * padded + lane) * factor_);
      for (int i = 0; i < n; ++i) {
        float *at = scores + size_t(i) * padded + lane;
        const Vec weight = exp2_of(load<Vec>(at) * factor_ - top);
        store(at, weight);
        total += weight;
      }
      for (int i = 0; i < n; ++i) {
        float *at = scores + size_t(i) * padded + lane;
        store(at, load<Vec>(at) / total);
      }
    }
  }

  static float lane_sum(const float *lanes, int first, int count) {
    float sum = 0;
    for (int i = first; i < first + count; ++i) sum += lanes[i];
    return sum;
  }

  // Mean query of each query block and head, [num_blocks * group, head_dim].
  void pool_queries() {
    if (!pooled_.empty()) return;
    pooled_.assign(size_t(num_blocks_) * group_ * d_, 0.0f);
    for (int block = 0; block < num_blocks_; ++block)
      for (int head = 0; head < group_; ++head) {
        float *mean = pooled_.data() + size_t(block * group_ + head) * d_;
        for (int c = 0; c < d_; c += 8) {
          Vec8 sum = {};
          for (int row = 0; row < rows_in(block); ++row) sum += load8(query(block * 64 + row, head) + c);
          store8(mean + c, sum / float(rows_in(block)));
        }
      }
  }

  // Exact softmax mass of the sampled rows on each listed block, mean per query block: [num_blocks, n].
  std::vector<float> rerank(const Blocks &blocks) {
    const int samples = num_rows_ == 1 ? 1 : int(config_.sampled_queries);  // a single row stands for all
    const int per_block = samples * group_, lanes = num_blocks_ * per_block;
    std::vector<int> picks;  // of each lane: the heads of a group interleave
    for (int block = 0; block < num_blocks_; ++block)
      for (int i = 0; i < per_block; ++i)
        picks.push_back(block * 64 + (2 * i + 1) * rows_in(block) / (2 * per_block));
    const auto row_of = [&](int lane) { return picks[size_t(lane)]; };
    const LaneTile tile(lanes, d_, scratch(kQueries, size_t(padded_lanes(lanes)) * d_), scratch(kState, size_t(d_)),
                        [&](int lane, float *to) {
                          const T *q = query(row_of(lane), lane % group_);
                          for (int c = 0; c < d_; c += 8) store8(to + c, load8(q + c));
                        });
    const int n = int(blocks.size()), padded = tile.padded;
    float *peaks = scratch(kBounds, size_t(n) * padded), *sums = scratch(kMasses, size_t(n) * padded);
    for (int j = 0; j < n; ++j) {
      const T *next = tile_of<T>(kv_.k, kv_.k_stride, s_.table[blocks[size_t(std::min(j + 1, n - 1))]], kv_head_);
      for (int i = 0; i < kBlock; ++i) fetch_row(next + i * kv_.k_stride[2], d_);
      block_mass(tile, row_of, blocks[size_t(j)], peaks + size_t(j) * padded, sums + size_t(j) * padded);
    }
    masses_from(peaks, sums, n, padded);
    std::vector<float> shares(size_t(num_blocks_) * n);
    for (int block = 0; block < num_blocks_; ++block)
      for (int j = 0; j < n; ++j)
        shares[size_t(block) * n + j] = lane_sum(sums + size_t(j) * padded, block * per_block, per_block) / per_block;
    return shares;
  }

  // Per lane: peak of factor * q.k over the block's visible keys, and sum of 2^(factor * q.k - peak).
  template <class RowOf>
  void block_mass(const LaneTile &tile, RowOf row_of, int64_t block, float *peaks, float *sums) {
    const int64_t base = block * kBlock;
    const int n = int(std::min<int64_t>(kBlock, first_position_ + num_rows_ - base));
    const T *k = tile_of<T>(kv_.k, kv_.k_stride, s_.table[block], kv_head_);
    Rows rows;
    gather(rows, n, d_, scratch(kRowsK, kBlock * d_), [&](int i) { return k + i * kv_.k_stride[2]; });
    float *scores = scratch(kScores, size_t(kBlock) * tile.padded);
    tile.template score<false>(rows, scores);
    if (base + n - 1 > first_position_)
      for (int lane = 0; lane < tile.lanes; ++lane)
        for (int64_t i = std::max<int64_t>(0, first_position_ + row_of(lane) + 1 - base); i < n; ++i)
          scores[i * tile.padded + lane] = -kInfinity;
    for (int lane = 0; lane < tile.padded; lane += kLanes) {
      Vec top = Vec{} + kLowest, total = {};
      for (int i = 0; i < n; ++i) top = maximum(top, load<Vec>(scores + i * tile.padded + lane) * factor_);
      for (int i = 0; i < n; ++i) total += exp2_of(load<Vec>(scores + i * tile.padded + lane) * factor_ - top);
      store(peaks + lane, top);
      store(sums + lane, total);
    }
  }

  // (peak, sum) of each block become shares that add up to 1 over the blocks, per lane, in `sums`.
  static void masses_from(const float *peaks, float *sums, int n, int padded) {
    for (int lane = 0; lane < padded; lane += kLanes) {
      Vec top = Vec{} + kLowest, total = {};
      for (int j = 0; j < n; ++j) top = maximum(top, load<Vec>(peaks + size_t(j) * padded + lane));
      for (int j = 0; j < n; ++j) {
        float *at = sums + size_t(j) * padded + lane;
        const Vec mass = load<Vec>(at) * exp2_of(load<Vec>(peaks + size_t(j) * padded + lane) - top);
        store(at, mass);
        total += mass;
      }
      for (int j = 0; j < n; ++j) {
        float *at = sums + size_t(j) * padded + lane;
        store(at, load<Vec>(at) / total);
      }
    }
  }

  // Forced blocks, then by share; equal shares keep the order of `blocks`. Writes ascending, then -1.
  int32_t keep_best(const Blocks &blocks, const float *shares, int64_t own, int32_t *indices) const {
    std::vector<int> order;
    float visible_mass = 0;
    const auto forced = [&](int i) {
      return blocks[size_t(i)] < config_.sink_blocks || blocks[size_t(i)] > own - config_.local_blocks;
    };
    for (int i = 0; i < int(blocks.size()); ++i) {
      if (blocks[size_t(i)] > own) continue;
      order.push_back(i);
      visible_mass += shares[i];
    }
    const size_t count = std::min(order.size(), size_t(config_.budget));
    std::partial_sort(order.begin(), order.begin() + int64_t(count), order.end(), [&](int a, int b) {
      if (forced(a) != forced(b)) return forced(a);
      return forced(a) || shares[a] == shares[b] ? a < b : shares[a] > shares[b];
    });
    int32_t kept = 0;
    double taken = 0;
    for (size_t i = 0; i < count; ++i) {
      if (forced(order[i]) || taken < config_.top_p) indices[kept++] = int32_t(blocks[size_t(order[i])]);
      taken += shares[order[i]] / std::max(visible_mass, 1e-30f);
    }
    std::sort(indices, indices + kept);
    std::fill(indices + kept, indices + config_.budget, -1);
    return kept;
  }

  const PagedKV &kv_;
  const Queries &queries_;
  const Stats &stats_;
  const TreeConfig &config_;
  const Sequence s_;
  const int kv_head_, d_, group_;
  const int64_t first_position_;
  const int num_rows_, num_blocks_;
  const int64_t first_own_, frontier_;
  const float factor_;
  std::vector<float> pooled_;
};

struct TreeTask {
  int64_t sequence, first_position, slot;
  int num_rows, kv_head;
};

// Sibling groups are aligned in absolute positions, so results do not depend on where chunks are cut.
inline std::vector<TreeTask> tree_tasks(const PagedKV &kv, const Queries &queries, const TreeConfig &config,
                                        const Lists &lists) {
  std::vector<TreeTask> tasks;
  const int64_t width = queries.cu_seqlens_q ? config.sibling_blocks * 64 : 1;
  for (int64_t b = 0; b < kv.batch; ++b) {
    const Sequence s = sequence_of(kv, queries.cu_seqlens_q, b);
    for (int64_t at = s.offset(); at < s.num_tokens;) {
      const int64_t stop = std::min((at / width + 1) * width, s.num_tokens);
      const int64_t slot = lists.cu_q_blocks[b] + (at - s.offset()) / 64;
      for (int head = 0; head < kv.num_kv_heads; ++head) tasks.push_back({b, at, slot, int(stop - at), head});
      at = stop;
    }
  }
  return tasks;
}

template <class T>
void select_tree(const PagedKV &kv, const Queries &queries, const Stats &stats, TreeConfig config,
                 const Lists &lists) {
  if (!queries.cu_seqlens_q) config.sibling_blocks = 1;
  const std::vector<TreeTask> tasks = tree_tasks(kv, queries, config, lists);
  parallel_for(int64_t(tasks.size()), kv.num_threads, [&](int64_t i) {
    const TreeTask &task = tasks[size_t(i)];
    const int64_t row = task.slot * kv.num_kv_heads + task.kv_head;
    TreeGroup<T>(kv, queries, stats, config, sequence_of(kv, queries.cu_seqlens_q, task.sequence), task.kv_head,
                 task.first_position, task.num_rows)
        .select(lists.indices + row * config.budget, lists.counts + row, kv.num_kv_heads);
  });
}

}  // namespace
