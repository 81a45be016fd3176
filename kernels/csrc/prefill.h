// Dense and block-sparse prefill. One task is up to 64 query rows times at most four query heads of one KV
// head: 256 lanes that share every K and V block read. Online softmax over the blocks (FlashAttention-2,
// arXiv 2307.08691), in base 2. The panels of a tile walk over a block while it sits in cache.
#pragma once
#include <cmath>
#include <vector>

#include "lanes.h"
#include "sequences.h"
#include "threads.h"

namespace {

constexpr int kTileHeads = 4;

// A lane's sums of 2^(logit - peak) * value, channels `stride` apart, become row `row` of the results.
template <class T>
inline void store_lane(const float *sums, int stride, int head_dim, float peak, float sum, int64_t row,
                       const Outputs &to) {
  const float inverse = sum > 0 ? 1 / sum : 0;
  to.lse[row] = sum > 0 ? (peak + std::log2(sum)) * kLn2 : -kInfinity;
  float line[8];
  for (int c = 0; c < head_dim; c += 8) {
    for (int i = 0; i < 8; ++i) line[i] = sums[(c + i) * stride] * inverse;
    store8(static_cast<T *>(to.out) + row * head_dim + c, load8(line));
  }
}

struct PrefillTask {
  int32_t sequence, kv_head, first_head, num_heads;  // heads count within the group
  int64_t start;                                     // first row, counted within the chunk
};

template <class T>
class PrefillTile {
 public:
  PrefillTile(const PagedKV &kv, const Queries &queries, const PrefillTask &task)
      : kv_(kv),
        queries_(queries),
        task_(task),
        s_(sequence_of(kv, queries.cu_seqlens_q, task.sequence)),
        d_(kv.head_dim),
        group_(queries.num_q_heads / kv.num_kv_heads),
        lanes_(int(std::min<int64_t>(64, s_.q_len - task.start)) * task.num_heads),
        padded_(padded_lanes(lanes_)),
        first_position_(s_.offset() + task.start),
        query_(scratch(kQueries, size_t(padded_) * d_)),
        out_(scratch(kOutput, size_t(padded_) * d_)),
        scores_(scratch(kScores, kBlock * kPanelVectors * kLanes)),
        peak_(scratch(kState, 2 * size_t(padded_))),
        sum_(peak_ + padded_) {
    std::fill(out_, out_ + size_t(padded_) * d_, 0.0f);
    std::fill(peak_, peak_ + padded_, kLowest);
    std::fill(sum_, sum_ + padded_, 0.0f);
    load_queries();
  }

  int64_t last_position() const { return position(lanes_ - 1); }

  void attend(int64_t block) {
    const int64_t base = block * kBlock;
    const int seen = int(std::min<int64_t>(kBlock, last_position() + 1 - base));
    if (block < 0 || seen <= 0) return;
    const int64_t page = s_.table[block];
    const T *k = tile_of<T>(kv_.k, kv_.k_stride, page, task_.kv_head);
    const T *v = tile_of<T>(kv_.v, kv_.v_stride, page, task_.kv_head);
    Rows keys, values;
    gather(keys, seen, d_, scratch(kRowsK, kBlock * d_), [&](int i) { return k + i * kv_.k_stride[2]; });
    gather(values, seen, d_, scratch(kRowsV, kBlock * d_), [&](int i) { return v + i * kv_.v_stride[2]; });
    for_each_panel(padded_, [&](auto nv, int first) {
      attend_panel<decltype(nv)::value>(keys, values, first, base, seen);
    });
  }

  void write(const Outputs &to) const {
    for_each_lane(padded_, d_, [&](int lane, int base, int stride) {
      if (lane < lanes_) store_lane<T>(out_ + base, stride, d_, peak_[lane], sum_[lane], out_row(lane), to);
    });
  }

 private:
  int64_t position(int lane) const { return first_position_ + lane / task_.num_heads; }
  int head(int lane) const { return task_.kv_head * group_ + task_.first_head + lane % task_.num_heads; }
  int64_t row(int lane) const { return s_.first_row + task_.start + lane / task_.num_heads; }
  int64_t out_row(int lane) const { return row(lane) * queries_.num_q_heads + head(lane); }

  void load_queries() {
    for_each_lane(padded_, d_, [&](int lane, int base, int stride) {
      float line[8] = {};
      for (int c = 0; c < d_; c += 8) {
        if (lane < lanes_) {
          const T *q = static_cast<const T *>(queries_.q) + row(lane) * queries_.q_stride[0];
          store8(line, load8(q + head(lane) * queries_.q_stride[1] + c));
        }
        for (int i = 0; i < 8; ++i) query_[base + (c + i) * stride] = line[i];
      }
    });
  }

  template <int NV>
  void attend_panel(const Rows &keys, const Rows &values, int first, int64_t base, int seen) {
    constexpr int width = NV * kLanes;
    const int last = std::min(first + width, lanes_) - 1;
    const int n = int(std::min<int64_t>(seen, position(last) + 1 - base));
    if (n <= 0) return;
    float *out = out_ + size_t(first) * d_;
    score_panel<NV, false>(keys, n, query_ + size_t(first) * d_, d_, scores_, width);
    if (position(first) < base + n - 1) mask_panel(first, width, base, n);
    Vec keep[NV];
    softmax_panel<NV>(first, n, keep);
    accumulate_panel<NV>(values, n, scores_, d_, out,
                         [&](Vec before, Vec added, int v) { return before * keep[v] + added; });
  }

  void mask_panel(int first, int width, int64_t base, int n) {
    for (int lane = 0; lane < width; ++lane)
      for (int64_t i = std::max<int64_t>(0, position(first + lane) + 1 - base); i < n; ++i)
        scores_[i * width + lane] = -kInfinity;
  }

  // Turns scores into weights; `keep` rescales what was accumulated under the old maximum.
  template <int NV>
  void softmax_panel(int first, int n, Vec *keep) {
    constexpr int width = NV * kLanes;
    const float factor = queries_.scale * kLog2e;
    for (int v = 0; v < NV; ++v) {
      float *scores = scores_ + v * kLanes, *peak = peak_ + first + v * kLanes, *sum = sum_ + first + v * kLanes;
      Vec top = load<Vec>(scores);
      for (int i = 1; i < n; ++i) top = maximum(top, load<Vec>(scores + i * width));
      const Vec before = load<Vec>(peak), now = maximum(before, top * factor);
      keep[v] = exp2_of(before - now);
      Vec total = {};
      for (int i = 0; i < n; ++i) {
        const Vec weight = exp2_of(load<Vec>(scores + i * width) * factor - now);
        store(scores + i * width, weight);
        total += weight;
      }
      store(peak, now);
      store(sum, load<Vec>(sum) * keep[v] + total);
    }
  }

  const PagedKV &kv_;
  const Queries &queries_;
  const PrefillTask task_;
  const Sequence s_;
  const int d_, group_, lanes_, padded_;
  const int64_t first_position_;
  float *query_, *out_, *scores_, *peak_, *sum_;
};

// Longest first, so that dense tiles (whose length grows with their row) end together.
inline std::vector<PrefillTask> prefill_tasks(const PagedKV &kv, const Queries &queries) {
  std::vector<PrefillTask> tasks;
  const int group = queries.num_q_heads / kv.num_kv_heads;
  const int parts = (group + kTileHeads - 1) / kTileHeads;
  for (int32_t b = 0; b < kv.batch; ++b) {
    const Sequence s = sequence_of(kv, queries.cu_seqlens_q, b);
    for (int64_t start = (s.q_len - 1) / 64 * 64; start >= 0 && s.q_len > 0; start -= 64)
      for (int32_t kv_head = 0; kv_head < kv.num_kv_heads; ++kv_head)
        for (int part = 0; part < parts; ++part) {
          const int first = group * part / parts, next = group * (part + 1) / parts;
          tasks.push_back({b, kv_head, first, next - first, start});
        }
  }
  return tasks;
}

template <class T>
void prefill(const PagedKV &kv, const Queries &queries, const Lists &lists, const Outputs &to) {
  const std::vector<PrefillTask> tasks = prefill_tasks(kv, queries);
  parallel_for(int64_t(tasks.size()), kv.num_threads, [&](int64_t i) {
    const PrefillTask &task = tasks[i];
    PrefillTile<T> tile(kv, queries, task);
    if (lists.indices) {
      const int64_t slot = lists.cu_q_blocks[task.sequence] + task.start / 64;
      const int64_t list = slot * kv.num_kv_heads + task.kv_head;
      for (int32_t j = 0; j < lists.counts[list]; ++j) tile.attend(lists.indices[list * lists.budget + j]);
    } else {
      for (int64_t block = 0; block * kBlock <= tile.last_position(); ++block) tile.attend(block);
    }
    tile.write(to);
  });
}

}  // namespace
