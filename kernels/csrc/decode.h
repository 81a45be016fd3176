// Dense and block-sparse decode: one query per sequence, bound by memory. The heads of a group share each K
// and V block read once; channels lie in vector lanes. Long lists are split at fixed places (so results do
// not depend on threads) and the parts merged by their maxima and sums (Flash-Decoding).
#pragma once
#include <cmath>
#include <vector>

#include "lanes.h"
#include "sequences.h"
#include "threads.h"

namespace {

constexpr int kSplitBlocks = 16;

// sums[i] of each of eight vectors: a butterfly that halves lanes and vectors together.
template <int S, int... I>
inline Vec8 fold(Vec8 a, Vec8 b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I & S ? I + 8 : I)...) +
         __builtin_shufflevector(a, b, (I & S ? (I ^ S) + 8 : I ^ S)...);
}

inline Vec8 sums_of(Vec8 (&a)[8]) {
  const auto lanes = std::make_integer_sequence<int, 8>{};
  for (int j = 0; j < 8; j += 2) a[j] = fold<1>(a[j], a[j + 1], lanes);
  for (int j = 0; j < 8; j += 4) a[j] = fold<2>(a[j], a[j + 2], lanes);
  return fold<4>(a[0], a[4], lanes);
}

// One part of one group's attention: unnormalised output [group, head_dim], peaks and sums [group].
struct Part {
  float *out, *peak, *sum;
};

template <class T>
class DecodeSplit {
 public:
  DecodeSplit(const PagedKV &kv, const Queries &queries, int64_t sequence, int kv_head, Part part)
      : kv_(kv),
        s_(sequence_of(kv, nullptr, sequence)),
        kv_head_(kv_head),
        d_(kv.head_dim),
        group_(queries.num_q_heads / kv.num_kv_heads),
        factor_(queries.scale * kLog2e),
        part_(part),
        query_(scratch(kQueries, size_t(group_) * d_)),
        scores_(scratch(kScores, size_t(group_ + 1) * (kBlock + 8))) {
    const T *q = static_cast<const T *>(queries.q) + sequence * queries.q_stride[0];
    for (int g = 0; g < group_; ++g)
      for (int c = 0; c < d_; c += 8)
        store8(query_ + g * d_ + c, load8(q + (kv_head * group_ + g) * queries.q_stride[1] + c));
    std::fill(part.out, part.out + group_ * d_, 0.0f);
    std::fill(part.peak, part.peak + group_, kLowest);
    std::fill(part.sum, part.sum + group_, 0.0f);
  }

  // `next` is the block after this one, fetched meanwhile; negative if none.
  void attend(int64_t block, int64_t next) {
    if (block < 0) return;
    const int n = int(std::min<int64_t>(kBlock, s_.num_tokens - block * kBlock));
    const int64_t page = s_.table[block];
    const T *k = tile_of<T>(kv_.k, kv_.k_stride, page, kv_head_);
    const T *v = tile_of<T>(kv_.v, kv_.v_stride, page, kv_head_);
    next_k_ = next < 0 ? k : tile_of<T>(kv_.k, kv_.k_stride, s_.table[next], kv_head_);
    next_v_ = next < 0 ? v : tile_of<T>(kv_.v, kv_.v_stride, s_.table[next], kv_head_);
    int g = 0;
    for (; g + 4 <= group_; g += 4) attend_heads<4>(g, k, v, n);
    for (; g + 2 <= group_; g += 2) attend_heads<2>(g, k, v, n);
    for (; g < group_; ++g) attend_heads<1>(g, k, v, n);
  }

 private:
  static constexpr int kRow = kBlock + 8;  // scores of a head, with room for a tile that overruns

  template <int H>
  void attend_heads(int g, const T *k, const T *v, int n) {
    score<H>(query_ + g * d_, k, n);
    float keep[H];
    for (int h = 0; h < H; ++h) keep[h] = softmax(g + h, scores_ + h * kRow, n);
    accumulate<H>(part_.out + g * d_, v, n, keep);
  }

  // Memory streams at full speed only if asked ahead of the arithmetic, and evenly: while the scores of a
  // block are computed the next block's keys are fetched, while its values are added up the next values.
  static void prefetch(const T *from, int64_t elements) {
    constexpr int line = 64 / int(sizeof(T));
    for (int64_t c = 0; c < elements; c += line) __builtin_prefetch(from + c, 0, 2);
  }

  template <int H>
  void score(const float *query, const T *k, int n) {
    constexpr int K = 8 / H;
    for (int i = 0; i < n; i += K) {
      for (int j = 0; j < K; ++j) prefetch(next_k_ + (i + j) * kv_.k_stride[2], d_);
      const T *row[K];
      for (int j = 0; j < K; ++j) row[j] = k + std::min(i + j, n - 1) * kv_.k_stride[2];
      Vec8 acc[8] = {};
      for (int c = 0; c < d_; c += 8) {
        Vec8 key[K];
        for (int j = 0; j < K; ++j) key[j] = load8(row[j] + c);
        for (int h = 0; h < H; ++h)
          for (int j = 0; j < K; ++j) acc[h * K + j] += load8(query + h * d_ + c) * key[j];
      }
      const Vec8 sums = sums_of(acc);
      float line[8];
      store8(line, sums);
      for (int h = 0; h < H; ++h) memcpy(scores_ + h * kRow + i, line + h * K, K * sizeof(float));
    }
  }

  // Turns scores into weights; returns what rescales the sums under the old maximum.
  float softmax(int g, float *scores, int n) {
    for (int i = n; i < (n + 7) / 8 * 8; ++i) scores[i] = -kInfinity;
    Vec8 tops = load8(scores), total = {};
    for (int i = 8; i < n; i += 8) tops = maximum(tops, load8(scores + i));
    float top = tops[0];
    for (int i = 1; i < 8; ++i) top = std::max(top, tops[i]);
    const float before = part_.peak[g], now = std::max(before, top * factor_);
    for (int i = 0; i < n; i += 8) {
      const Vec8 weight = exp2_of(load8(scores + i) * factor_ - now);
      store8(scores + i, weight);
      total += weight;
    }
    const float keep = std::exp2(before - now);
    part_.peak[g] = now;
    part_.sum[g] = part_.sum[g] * keep + horizontal_sum(total);
    return keep;
  }

  template <int H>
  void accumulate(float *out, const T *v, int n, const float *keep) {
    int c = 0;
    for (; c + 16 <= d_; c += 16) accumulate_channels<H, 2>(out + c, v + c, n, keep, next_v_ + c * kBlock);
    if (c < d_) accumulate_channels<H, 1>(out + c, v + c, n, keep, next_v_ + c * kBlock);
  }

  template <int H, int NV>
  void accumulate_channels(float *out, const T *v, int n, const float *keep, const T *next) {
    Vec8 acc[H][NV] = {};
    for (int i = 0; i < n; ++i) {
      __builtin_prefetch(next + i * 8 * NV, 0, 2);
      for (int j = 0; j < NV; ++j) {
        const Vec8 value = load8(v + i * kv_.v_stride[2] + j * 8);
        for (int h = 0; h < H; ++h) acc[h][j] += scores_[h * kRow + i] * value;
      }
    }
    for (int h = 0; h < H; ++h)
      for (int j = 0; j < NV; ++j) {
        float *to = out + h * d_ + j * 8;
        store8(to, load8(to) * keep[h] + acc[h][j]);
      }
  }

  const PagedKV &kv_;
  const Sequence s_;
  const int kv_head_, d_, group_;
  const float factor_;
  const Part part_;
  float *query_, *scores_;
  const T *next_k_ = nullptr, *next_v_ = nullptr;
};

struct DecodeTask {
  int64_t sequence, first, last;  // entries of the list, or blocks
  int kv_head;
};

inline int64_t listed(const PagedKV &kv, const Lists &lists, int64_t sequence, int kv_head) {
  if (!lists.indices) return sequence_of(kv, nullptr, sequence).num_pages();
  return lists.counts[lists.cu_q_blocks[sequence] * int64_t(kv.num_kv_heads) + kv_head];
}

template <class T>
void write_merged(const Part *parts, int64_t num_parts, int group, int d, T *out, float *lse) {
  for (int g = 0; g < group; ++g) {
    float peak = kLowest, sum = 0;
    for (int64_t i = 0; i < num_parts; ++i) peak = std::max(peak, parts[i].peak[g]);
    for (int64_t i = 0; i < num_parts; ++i) sum += parts[i].sum[g] * std::exp2(parts[i].peak[g] - peak);
    lse[g] = sum > 0 ? (peak + std::log2(sum)) * kLn2 : -kInfinity;
    for (int c = 0; c < d; c += 8) {
      Vec8 line = {};
      for (int64_t i = 0; i < num_parts; ++i)
        if (sum > 0) line += load8(parts[i].out + g * d + c) * (std::exp2(parts[i].peak[g] - peak) / sum);
      store8(out + g * d + c, line);
    }
  }
}

template <class T>
void decode(const PagedKV &kv, const Queries &queries, const Lists &lists, const Outputs &to) {
  const int group = queries.num_q_heads / kv.num_kv_heads, d = kv.head_dim;
  std::vector<DecodeTask> tasks;
  std::vector<int64_t> first_part{0};
  for (int64_t b = 0; b < kv.batch; ++b)
    for (int head = 0; head < kv.num_kv_heads; ++head) {
      const int64_t n = listed(kv, lists, b, head);
      for (int64_t i = 0; i < n; i += kSplitBlocks)
        tasks.push_back({b, i, std::min<int64_t>(i + kSplitBlocks, n), head});
      first_part.push_back(int64_t(tasks.size()));
    }
  std::vector<float> memory(tasks.size() * group * (d + 2));
  std::vector<Part> parts(tasks.size());
  for (size_t i = 0; i < tasks.size(); ++i) {
    float *at = memory.data() + i * group * (d + 2);
    parts[i] = {at, at + group * d, at + group * (d + 1)};
  }
  parallel_for(int64_t(tasks.size()), kv.num_threads, [&](int64_t i) {
    const DecodeTask &task = tasks[i];
    DecodeSplit<T> split(kv, queries, task.sequence, task.kv_head, parts[i]);
    const int64_t slot = lists.indices ? lists.cu_q_blocks[task.sequence] : 0;
    const int32_t *list = lists.indices + (slot * kv.num_kv_heads + task.kv_head) * lists.budget;
    const auto entry = [&](int64_t j) { return lists.indices ? int64_t(list[j]) : j; };
    for (int64_t j = task.first; j < task.last; ++j)
      split.attend(entry(j), j + 1 < task.last ? entry(j + 1) : -1);
  });
  for (int64_t pair = 0; pair < kv.batch * kv.num_kv_heads; ++pair) {
    const int64_t row = pair * group;  // rows of out are (sequence, head), which pairs enumerate in order
    write_merged(parts.data() + first_part[pair], first_part[pair + 1] - first_part[pair], group, d,
                 static_cast<T *>(to.out) + row * d, to.lse + row);
  }
}

}  // namespace
