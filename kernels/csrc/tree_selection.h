// The `tree` selector for prefill (row_selection.h is decode's): one task is a sibling group and a KV head. Mean queries
// walk down the tree of key boxes with a beam; the pages they end with are scored exactly by a few sampled rows of each
// query block; each query block keeps its best. With a beam of every page it is `two_stage`. Same steps and names as
// reference/select_blocks_tree.py. Queries lie in lanes (see lanes.h), so a box or a key is read once for all
// siblings, samples and heads.
//
// Where every row of a single head ranks, its logits are those that attention needs: `attend_block` does both, one
// query block at a time.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "block_stats.h"
#include "lane_tile.h"
#include "prefill.h"

namespace {

using Blocks = std::vector<int64_t>;
constexpr int kMostKept = 256;  // blocks whose weights a thread keeps while it ranks: 4 MB

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

// Memory that will be read next, asked for evenly while what came before it is worked on.
template <class T>
struct Ahead {
  const T *at = nullptr, *end = nullptr;
  int64_t per_row = 0;  // elements

  void fetch(int rows) {
    for (const T *stop = std::min(at + rows * per_row, end); at < stop; at += 64 / sizeof(T))
      __builtin_prefetch(at, 0, 2);
  }
};

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
    const Blocks blocks = blocks_to_rank();
    const std::vector<Scores> scores = rerank(blocks);
    for (int i = 0; i < num_blocks_; ++i)
      counts[i * row_stride] =
          keep_best(blocks, scores[size_t(i)], first_own_ + i, indices + i * row_stride * config_.budget);
  }

  Blocks blocks_to_rank() {
    const Blocks forced = forced_blocks();
    Blocks blocks = candidates(descend(), forced);
    std::sort(blocks.begin(), blocks.end());
    blocks.insert(blocks.begin(), forced.begin(), forced.end());
    return blocks;
  }

  // Of query block `i`, for a single head of which every row ranks: the list as by `select`, and attention over it.
  // The weights by which blocks are ranked are kept, and those of the blocks taken multiply their values. Of more
  // than kMostKept blocks none are kept, and those needed are computed again.
  int32_t attend_block(const Blocks &to_rank, int i, int32_t *indices, const Outputs &to) {
    Blocks blocks;
    for (const int64_t block : to_rank)
      if (block <= first_own_ + i) blocks.push_back(block);
    const std::vector<int> rows = sample(i, 1, num_rows_ == 1 ? 1 : 64);
    const LaneTile tile = queries_of(rows);
    const int n = int(blocks.size()), padded = tile.padded;
    const size_t apart = n <= kMostKept ? size_t(kBlock) * padded : 0;
    float *weights = scratch(kWeights, std::max(size_t(kBlock) * padded, apart * n));
    float *peaks = scratch(kBounds, size_t(n) * padded), *sums = scratch(kScores, size_t(n) * padded);
    const auto weigh = [&](int j) {
      const size_t at = size_t(j) * padded;
      block_mass(tile, rows, blocks[size_t(j)], weights + j * apart, peaks + at, sums + at);
    };
    for (int j = 0; j < n; ++j) {
      fetch_keys(blocks[size_t(std::min(j + 1, n - 1))]);
      weigh(j);
    }
    float *masses = scratch(kMasses, size_t(n) * padded);
    masses_from(peaks, sums, n, padded, masses);
    const int32_t count = keep_best(blocks, scores_of(masses, n, padded, 0, tile.lanes), first_own_ + i, indices);

    float *out = scratch(kOutput, size_t(padded) * d_), *top = scratch(kState, 2 * size_t(padded)), *sum = top + padded;
    std::fill(out, out + size_t(padded) * d_, 0.0f);
    std::fill(top, top + padded, kLowest);
    std::fill(sum, sum + padded, 0.0f);
    std::vector<int> taken;
    for (int32_t at = 0; at < count; ++at)
      taken.push_back(int(std::find(blocks.begin(), blocks.end(), indices[at]) - blocks.begin()));
    for (const int j : taken)
      for (int lane = 0; lane < padded; lane += kLanes)
        store(top + lane, maximum(load<Vec>(top + lane), load<Vec>(peaks + size_t(j) * padded + lane)));
    for (const int j : taken) {
      if (!apart) weigh(j);
      const size_t at = size_t(j) * padded;
      add_values(rows, blocks[size_t(j)], padded, weights + j * apart, peaks + at, sums + at, top, sum, out);
    }
    const int64_t first_row = s_.first_row + first_position_ - s_.offset();
    for_each_lane(padded, d_, [&](int lane, int base, int stride) {
      if (lane >= tile.lanes) return;
      const int64_t row = (first_row + rows[size_t(lane)]) * queries_.num_q_heads + kv_head_;
      store_lane<T>(out + base, stride, d_, top[lane], sum[lane], row, to);
    });
    return count;
  }

  // Of a single row: queries [group, head_dim] as `row_masses` takes them.
  std::vector<float> row_queries() const {
    std::vector<float> rows(size_t(group_) * d_);
    for (int head = 0; head < group_; ++head)
      for_each_channels(d_, [&](auto width, int c) {
        store_channels<width>(&rows[size_t(head * d_ + c)], load_channels<width>(query(0, head) + c));
      });
    return rows;
  }

  const T *keys_of(int64_t block) const { return tile_of<T>(kv_.k, kv_.k_stride, s_.table[block], kv_head_); }

  // Of a single row, per head: peak of factor * q.k over the keys of a block that it sees, and the sum of
  // 2^(factor * q.k - peak).
  void row_masses(const float *rows, int64_t block, Ahead<T> &ahead, float *peaks, float *sums) const {
    for_each_heads(group_, [&](auto heads, int first) {
      row_mass<heads>(rows + first * d_, block, ahead, peaks + first, sums + first);
    });
  }

  // Of a single row: the list, from peaks and sums [blocks, padded lanes]; sums are overwritten.
  int32_t keep_by_row(const Blocks &blocks, const float *peaks, float *sums, int32_t *indices) const {
    const int n = int(blocks.size()), padded = padded_lanes(group_);
    masses_from(peaks, sums, n, padded, sums);
    return keep_best(blocks, scores_of(sums, n, padded, 0, group_), first_own_, indices);
  }

 private:
  template <int H>
  void row_mass(const float *rows, int64_t block, Ahead<T> &ahead, float *peaks, float *sums) const {
    constexpr int K = 8 / H, apart = kBlock + 8;  // room for products past the last key
    alignas(64) float scores[H * apart];
    const int n = keys_in(block);
    const int64_t stride = kv_.k_stride[2];
    const T *k = keys_of(block);
    dot_rows<H>(rows, d_, n, [&](int i) { return k + i * stride; }, [&](int i, const float *products) {
      ahead.fetch(K);
      for (int h = 0; h < H; ++h) memcpy(scores + h * apart + i, products + h * K, K * sizeof(float));
    });
    for (int h = 0; h < H; ++h) {
      float *own = scores + h * apart;
      std::fill(own + n, own + (n + 7) / 8 * 8, -kInfinity);
      Vec8 tops = load8(own), total = {};
      for (int i = 8; i < n; i += 8) tops = maximum(tops, load8(own + i));
      float top = tops[0];
      for (int i = 1; i < 8; ++i) top = std::max(top, tops[i]);
      peaks[h] = top * factor_;
      for (int i = 0; i < n; i += 8) total += exp2_of(load8(own + i) * factor_ - peaks[h]);
      sums[h] = horizontal_sum(total);
    }
  }

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
    if (free.size() <= size_t(config_.num_candidates)) return free;
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

  // Of one query block, for each listed block: the share of attention it gets, and what it is ranked by.
  struct Scores {
    std::vector<float> shares, ranks;
  };

  // From the rows' masses [n, padded], of which it has the lanes from `first` on.
  Scores scores_of(const float *masses, int n, int padded, int first, int lanes) const {
    Scores scores;
    for (int j = 0; j < n; ++j) {
      const float *own = masses + size_t(j) * padded;
      scores.shares.push_back(lane_sum(own, first, lanes) / lanes);
      scores.ranks.push_back(config_.by_peak ? *std::max_element(own + first, own + first + lanes) : scores.shares.back());
    }
    return scores;
  }

  // By the exact softmax masses of the sampled rows on each listed block.
  std::vector<Scores> rerank(const Blocks &blocks) {
    const int samples = num_rows_ == 1 ? 1 : int(config_.sampled_queries);  // a single row stands for all
    const int per_block = samples * group_;
    const std::vector<int> rows = sample(0, num_blocks_, per_block);
    const LaneTile tile = queries_of(rows);
    const int n = int(blocks.size()), padded = tile.padded;
    float *peaks = scratch(kBounds, size_t(n) * padded), *sums = scratch(kMasses, size_t(n) * padded);
    float *weights = scratch(kScores, size_t(kBlock) * padded);
    for (int j = 0; j < n; ++j) {
      fetch_keys(blocks[size_t(std::min(j + 1, n - 1))]);
      const size_t at = size_t(j) * padded;
      block_mass(tile, rows, blocks[size_t(j)], weights, peaks + at, sums + at);
    }
    masses_from(peaks, sums, n, padded, sums);
    std::vector<Scores> scores;
    for (int block = 0; block < num_blocks_; ++block)
      scores.push_back(scores_of(sums, n, padded, block * per_block, per_block));
    return scores;
  }

  // The row of each lane: `per_block` of every query block, spread evenly; the heads of a group interleave.
  std::vector<int> sample(int first_block, int num_blocks, int per_block) const {
    std::vector<int> rows;
    for (int block = first_block; block < first_block + num_blocks; ++block)
      for (int i = 0; i < per_block; ++i)
        rows.push_back(block * 64 + (2 * i + 1) * rows_in(block) / (2 * per_block));
    return rows;
  }

  LaneTile queries_of(const std::vector<int> &rows) const {
    const int lanes = int(rows.size());
    return LaneTile(lanes, d_, scratch(kQueries, size_t(padded_lanes(lanes)) * d_), scratch(kState, size_t(d_)),
                    [&](int lane, float *to) {
                      const T *q = query(rows[size_t(lane)], lane % group_);
                      for (int c = 0; c < d_; c += 8) store8(to + c, load8(q + c));
                    });
  }

  void fetch_keys(int64_t block) const {
    const T *k = keys_of(block);
    for (int i = 0; i < kBlock; ++i) fetch_row(k + i * kv_.k_stride[2], d_);
  }

  // Keys of a block that the group's last row sees.
  int keys_in(int64_t block) const {
    return int(std::min<int64_t>(kBlock, first_position_ + num_rows_ - block * kBlock));
  }

  // Per lane: peak of factor * q.k over the block's visible keys, `weights` 2^(factor * q.k - peak) panel by panel,
  // and their sum.
  void block_mass(const LaneTile &tile, const std::vector<int> &rows, int64_t block, float *weights, float *peaks,
                  float *sums) const {
    const int64_t base = block * kBlock;
    const T *k = keys_of(block);
    const int n = keys_in(block);
    Rows keys;
    gather(keys, n, d_, scratch(kRowsK, kBlock * d_), [&](int i) { return k + i * kv_.k_stride[2]; });
    tile.score_by_panel(keys, weights, [&](int first, int width, float *scores) {
      if (base + n - 1 > first_position_)
        for (int lane = 0; lane < width && first + lane < tile.lanes; ++lane)
          for (int64_t i = std::max<int64_t>(0, first_position_ + rows[size_t(first + lane)] + 1 - base); i < n; ++i)
            scores[i * width + lane] = -kInfinity;
      for (int lane = 0; lane < width; lane += kLanes) {
        Vec top = Vec{} + kLowest, total = {};
        for (int i = 0; i < n; ++i) top = maximum(top, load<Vec>(scores + i * width + lane) * factor_);
        for (int i = 0; i < n; ++i) {
          const Vec weight = exp2_of(load<Vec>(scores + i * width + lane) * factor_ - top);
          store(scores + i * width + lane, weight);
          total += weight;
        }
        store(peaks + first + lane, top);
        store(sums + first + lane, total);
      }
    });
  }

  // (peak, sum) of each block become shares that add up to 1 over the blocks, per lane; `shares` may be `sums`.
  static void masses_from(const float *peaks, const float *sums, int n, int padded, float *shares) {
    for (int lane = 0; lane < padded; lane += kLanes) {
      Vec top = Vec{} + kLowest, total = {};
      for (int j = 0; j < n; ++j) top = maximum(top, load<Vec>(peaks + size_t(j) * padded + lane));
      for (int j = 0; j < n; ++j) {
        const size_t at = size_t(j) * padded + lane;
        const Vec mass = load<Vec>(sums + at) * exp2_of(load<Vec>(peaks + at) - top);
        store(shares + at, mass);
        total += mass;
      }
      for (int j = 0; j < n; ++j) {
        float *at = shares + size_t(j) * padded + lane;
        store(at, load<Vec>(at) / total);
      }
    }
  }

  // Values of a block times its weights, brought from the block's peaks to those of all the list, `top`.
  void add_values(const std::vector<int> &rows, int64_t block, int padded, const float *weights, const float *peaks,
                  const float *sums, const float *top, float *sum, float *out) const {
    const T *v = tile_of<T>(kv_.v, kv_.v_stride, s_.table[block], kv_head_);
    Rows values;
    gather(values, keys_in(block), d_, scratch(kRowsV, kBlock * d_), [&](int i) { return v + i * kv_.v_stride[2]; });
    for_each_panel(padded, [&](auto nv, int first) {
      constexpr int NV = decltype(nv)::value;
      const size_t last = std::min(size_t(first + NV * kLanes), rows.size()) - 1;
      const int n = int(std::min<int64_t>(values.n, first_position_ + rows[last] + 1 - block * kBlock));
      Vec gain[NV];
      for (int k = 0; k < NV; ++k) {
        const int lane = first + k * kLanes;
        gain[k] = exp2_of(load<Vec>(peaks + lane) - load<Vec>(top + lane));
        store(sum + lane, load<Vec>(sum + lane) + load<Vec>(sums + lane) * gain[k]);
      }
      accumulate_panel<NV>(values, n, weights + size_t(first) * kBlock, d_, out + size_t(first) * d_,
                           [&](Vec before, Vec added, int k) { return before + added * gain[k]; });
    });
  }

  // Forced blocks, then by rank; equal ranks keep the order of `blocks`. Writes ascending, then -1.
  int32_t keep_best(const Blocks &blocks, const Scores &scores, int64_t own, int32_t *indices) const {
    const std::vector<float> &shares = scores.shares, &ranks = scores.ranks;
    std::vector<int> order;
    float visible_mass = 0;
    const auto forced = [&](int i) {
      return blocks[size_t(i)] < config_.sink_blocks || blocks[size_t(i)] > own - config_.local_blocks;
    };
    for (int i = 0; i < int(blocks.size()); ++i) {
      if (blocks[size_t(i)] > own) continue;
      order.push_back(i);
      visible_mass += shares[size_t(i)];
    }
    const size_t count = std::min(order.size(), size_t(config_.budget));
    std::partial_sort(order.begin(), order.begin() + int64_t(count), order.end(), [&](int a, int b) {
      if (forced(a) != forced(b)) return forced(a);
      return forced(a) || ranks[size_t(a)] == ranks[size_t(b)] ? a < b : ranks[size_t(a)] > ranks[size_t(b)];
    });
    int32_t kept = 0;
    double taken = 0;
    for (size_t i = 0; i < count; ++i) {
      if (forced(order[i]) || taken < config_.top_p) indices[kept++] = int32_t(blocks[size_t(order[i])]);
      taken += shares[size_t(order[i])] / std::max(visible_mass, 1e-30f);
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
  const int64_t width = config.sibling_blocks * 64;
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
TreeGroup<T> group_of(const PagedKV &kv, const Queries &queries, const Stats &stats, const TreeConfig &config,
                      const TreeTask &task) {
  return TreeGroup<T>(kv, queries, stats, config, sequence_of(kv, queries.cu_seqlens_q, task.sequence), task.kv_head,
                      task.first_position, task.num_rows);
}

template <class T>
void select_tree(const PagedKV &kv, const Queries &queries, const Stats &stats, const TreeConfig &config,
                 const Lists &lists) {
  const std::vector<TreeTask> tasks = tree_tasks(kv, queries, config, lists);
  parallel_for(int64_t(tasks.size()), kv.num_threads, [&](int64_t i) {
    const TreeTask &task = tasks[size_t(i)];
    const int64_t row = task.slot * kv.num_kv_heads + task.kv_head;
    group_of<T>(kv, queries, stats, config, task)
        .select(lists.indices + row * config.budget, lists.counts + row, kv.num_kv_heads);
  });
}

// Prefill where every head has lists of its own, ranked by all 64 rows of a block: selects, and attends.
template <class T>
void select_and_attend(const PagedKV &kv, const Queries &queries, const Stats &stats, const TreeConfig &config,
                       const Lists &lists, const Outputs &to) {
  const std::vector<TreeTask> tasks = tree_tasks(kv, queries, config, lists);
  std::vector<Blocks> to_rank(tasks.size());
  parallel_for(int64_t(tasks.size()), kv.num_threads, [&](int64_t i) {
    to_rank[size_t(i)] = group_of<T>(kv, queries, stats, config, tasks[size_t(i)]).blocks_to_rank();
  });
  std::vector<std::pair<size_t, int>> query_blocks;  // of which task, and its number there
  for (size_t i = 0; i < tasks.size(); ++i)
    for (int block = 0; block * 64 < tasks[i].num_rows; ++block) query_blocks.emplace_back(i, block);
  parallel_for(int64_t(query_blocks.size()), kv.num_threads, [&](int64_t i) {
    const auto [index, block] = query_blocks[size_t(i)];
    const TreeTask &task = tasks[index];
    const int64_t row = (task.slot + block) * kv.num_kv_heads + task.kv_head;
    lists.counts[row] = group_of<T>(kv, queries, stats, config, task)
                            .attend_block(to_rank[index], block, lists.indices + row * config.budget, to);
  });
}

}  // namespace
