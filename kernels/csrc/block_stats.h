// Statistics of complete pages (mean, minimum, maximum, spread of K) and of the tree nodes above them. Every
// page is read once, and once more from cache for the spread.
#pragma once
#include <cmath>

#include "sequences.h"
#include "threads.h"

namespace {

// As layout.py: where a node lives relative to the first page after it.
constexpr int kFanout = 4;
constexpr int64_t kHomeOffsets[] = {-1, -1, 0, 1, 2, 4, 5, 6, 8, 9};
constexpr int kNumLevels = 10;

inline int64_t pages_per_node(int level) { return int64_t{1} << (2 * level); }

inline int64_t home_of(int level, int64_t node) { return (node + 1) * pages_per_node(level) + kHomeOffsets[level]; }

template <class T>
void page_stats(const T *keys, int64_t stride, int d, int64_t row, const Stats &stats) {
  Vec8 square = {};
  for (int c = 0; c < d; c += 8) {
    const Vec8 first = load8(keys + c);
    Vec8 sum = {}, lower = first, upper = first;
    for (int i = 0; i < 64; ++i) {
      const Vec8 key = load8(keys + i * stride + c);
      sum += key;
      lower = minimum(lower, key);
      upper = maximum(upper, key);
    }
    const Vec8 mean = sum * (1.0f / 64);
    for (int i = 0; i < 64; ++i) {
      const Vec8 apart = load8(keys + i * stride + c) - mean;
      square += apart * apart;
    }
    store8(static_cast<T *>(stats.mean) + row * d + c, mean);
    store8(static_cast<T *>(stats.minimum) + row * d + c, lower);
    store8(static_cast<T *>(stats.maximum) + row * d + c, upper);
  }
  float line[8] = {std::sqrt(horizontal_sum(square) / 64)};
  T rounded[8];
  store8(rounded, load8(line));
  static_cast<T *>(stats.spread)[row] = rounded[0];
}

// Box of a node: the union of its four children's, which live at their own homes.
template <class T>
void node_stats(const PagedKV &kv, const Stats &stats, const int32_t *table, int level, int64_t node) {
  const int64_t width = int64_t(kv.num_kv_heads) * kv.head_dim;
  const void *lower = level == 1 ? stats.minimum : stats.coarse_minimum;
  const void *upper = level == 1 ? stats.maximum : stats.coarse_maximum;
  const int64_t to = table[home_of(level, node)] * width;
  int64_t from[kFanout];
  for (int i = 0; i < kFanout; ++i) from[i] = table[home_of(level - 1, node * kFanout + i)] * width;
  for (int64_t c = 0; c < width; c += 8) {
    Vec8 low = load8(static_cast<const T *>(lower) + from[0] + c);
    Vec8 high = load8(static_cast<const T *>(upper) + from[0] + c);
    for (int i = 1; i < kFanout; ++i) {
      low = minimum(low, load8(static_cast<const T *>(lower) + from[i] + c));
      high = maximum(high, load8(static_cast<const T *>(upper) + from[i] + c));
    }
    store8(static_cast<T *>(stats.coarse_minimum) + to + c, low);
    store8(static_cast<T *>(stats.coarse_maximum) + to + c, high);
  }
}

template <class T>
void update_sequence(const PagedKV &kv, const Stats &stats, int64_t b, int64_t num_new_tokens) {
  const Sequence s = sequence_of(kv, nullptr, b);
  const int64_t first = std::max<int64_t>(s.num_tokens - num_new_tokens, 0) / 64, last = s.num_tokens / 64;
  parallel_for(last - first, kv.num_threads, [&](int64_t i) {
    const int64_t page = s.table[first + i];
    for (int head = 0; head < kv.num_kv_heads; ++head)
      page_stats(tile_of<T>(kv.k, kv.k_stride, page, head), kv.k_stride[2], kv.head_dim,
                 page * kv.num_kv_heads + head, stats);
  });
  for (int level = 1; level < kNumLevels; ++level) {
    // nodes whose home is in [first, last)
    const int64_t size = pages_per_node(level), offset = kHomeOffsets[level];
    const int64_t begin = std::max<int64_t>(1, (first - offset + size - 1) / size);
    const int64_t end = last > offset ? (last - offset + size - 1) / size : 0;
    if (begin < end)
      parallel_for(end - begin, kv.num_threads,
                   [&](int64_t i) { node_stats<T>(kv, stats, s.table, level, begin + i - 1); });
  }
}

}  // namespace
