// Dense and block-sparse decode: one query per sequence, bound by memory. The heads of a group share each K
// and V block read once; channels lie in vector lanes. Long lists are split at fixed places (so results do
// not depend on threads) and the parts merged by their maxima and sums (Flash-Decoding).
#pragma once
#include <cmath>
#include <vector>

#include "dot_rows.h"
#include "lanes.h"
#include "sequences.h"
#include "threads.h"

namespace {

constexpr int kSplitBlocks = 16;

// A range of blocks (entries of a list, if there is one) for some KV heads of a sequence.
struct DecodeTask {
  int64_t sequence, first, last;
  int first_head, num_heads;
};

// What a task finds: unnormalised output [query heads, head_dim], peaks and sums [query heads].
struct Part {
  float *out, *peak, *sum;
};

template <class T>
class DecodeSplit {
 public:
  DecodeSplit(const PagedKV &kv, const Queries &queries, const DecodeTask &task, Part part)
      : kv_(kv),
        s_(sequence_of(kv, nullptr, task.sequence)),
        first_head_(task.first_head),
        d_(kv.head_dim),
        group_(queries.num_q_heads / kv.num_kv_heads),
        factor_(queries.scale * kLog2e),
        part_(part),
        query_(scratch(kQueries, size_t(task.num_heads) * group_ * d_)),
        scores_(scratch(kScores, size_t(kMostHeads) * kRow)) {
    const int rows = task.num_heads * group_;
    for (int row = 0; row < rows; ++row) {
      const T *q = static_cast<const T *>(queries.q) + task.sequence * queries.q_stride[0] +
                   (first_head_ * group_ + row) * queries.q_stride[1];
      for_each_channels(d_, [&](auto width, int c) {
        store_channels<width>(query_ + row * d_ + c, load_channels<width>(q + c));
      });
    }
    std::fill(part.out, part.out + rows * d_, 0.0f);
    std::fill(part.peak, part.peak + rows, kLowest);
    std::fill(part.sum, part.sum + rows, 0.0f);
  }

  // The block of one KV head; the one attended to next is fetched meanwhile, if there is one.
  void attend(int head, int64_t block, int next_head, int64_t next) {
    if (block < 0) return;
    const int n = int(std::min<int64_t>(kBlock, s_.num_tokens - block * kBlock));
    const T *k = keys(head, block), *v = values(head, block);
    next_k_ = next < 0 ? k : keys(next_head, next);
    next_v_ = next < 0 ? v : values(next_head, next);
    const int row = (head - first_head_) * group_;
    for_each_heads(group_, [&](auto heads, int first) { attend_heads<heads>(row + first, k, v, n); });
  }

 private:
  static constexpr int kMostHeads = 4;
  static constexpr int kRow = kBlock + 8;  // scores of a head, with room for a tile that overruns

  const T *keys(int head, int64_t block) const { return tile_of<T>(kv_.k, kv_.k_stride, s_.table[block], head); }
  const T *values(int head, int64_t block) const { return tile_of<T>(kv_.v, kv_.v_stride, s_.table[block], head); }

  template <int H>
  void attend_heads(int g, const T *k, const T *v, int n) {
    score<H>(query_ + g * d_, k, n);
    float keep[H];
    for (int h = 0; h < H; ++h) keep[h] = softmax(g + h, scores_ + h * kRow, n);
    const T *next = next_v_;
    for_each_channels(d_, [&](auto width, int c) {
      accumulate<H, width>(part_.out + g * d_ + c, v + c, n, keep, next);
    });
  }

  // Memory streams at full speed only if asked ahead of the arithmetic, and evenly: while the scores of a
  // block are computed the next block's keys are fetched, while its values are added up the next values.
  static void fetch(const T *&from, int elements) {
    constexpr int line = 64 / int(sizeof(T));
    for (int c = 0; c < elements; c += line) __builtin_prefetch(from + c, 0, 2);
    from += elements;
  }

  template <int H>
  void score(const float *query, const T *k, int n) {
    constexpr int K = 8 / H;
    const T *next = next_k_;
    const int64_t stride = kv_.k_stride[2];
    dot_rows<H>(query, d_, n, [&](int i) { return k + i * stride; }, [&](int i, const float *products) {
      fetch(next, K * d_);
      for (int h = 0; h < H; ++h) memcpy(scores_ + h * kRow + i, products + h * K, K * sizeof(float));
    });
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

  // out[h] = keep[h] * out[h] + sum over i < n of scores[h][i] * v[i], for `width` channels
  template <int H, int width>
  void accumulate(float *out, const T *v, int n, const float *keep, const T *&next) {
    constexpr int P = width / 8;
    Vec8 acc[H][P] = {};
    const int64_t stride = kv_.v_stride[2];
    for (int i = 0; i < n; ++i, v += stride) {
      fetch(next, width);
      const Pair value = load_channels<width>(v);
      for (int h = 0; h < H; ++h)
        for (int part = 0; part < P; ++part) acc[h][part] += scores_[h * kRow + i] * value.half[part];
    }
    for (int h = 0; h < H; ++h)
      for (int part = 0; part < P; ++part) {
        float *to = out + h * d_ + 8 * part;
        store8(to, load8(to) * keep[h] + acc[h][part]);
      }
  }

  const PagedKV &kv_;
  const Sequence s_;
  const int first_head_, d_, group_;
  const float factor_;
  const Part part_;
  float *query_, *scores_;
  const T *next_k_ = nullptr, *next_v_ = nullptr;
};

// Without lists a task takes all heads: their tiles of a block are neighbours in memory.
inline std::vector<DecodeTask> decode_tasks(const PagedKV &kv, const Lists &lists) {
  std::vector<DecodeTask> tasks;
  const int num_heads = lists.indices ? 1 : kv.num_kv_heads;
  const int64_t width = lists.indices ? kSplitBlocks : std::max(1, kSplitBlocks / num_heads);
  for (int64_t b = 0; b < kv.batch; ++b)
    for (int head = 0; head < kv.num_kv_heads; head += num_heads) {
      const int64_t n = lists.indices ? lists.counts[lists.cu_q_blocks[b] * int64_t(kv.num_kv_heads) + head]
                                      : sequence_of(kv, nullptr, b).num_pages();
      for (int64_t first = 0; first == 0 || first < n; first += width)
        tasks.push_back({b, first, std::min(first + width, n), head, num_heads});
    }
  return tasks;
}

template <class T>
void attend_task(const PagedKV &kv, const Queries &queries, const Lists &lists, const DecodeTask &task, Part part) {
  DecodeSplit<T> split(kv, queries, task, part);
  const int64_t slot = lists.indices ? lists.cu_q_blocks[task.sequence] : 0;
  const int32_t *list = lists.indices + (slot * kv.num_kv_heads + task.first_head) * lists.budget;
  const auto block = [&](int64_t i) { return i >= task.last ? -1 : lists.indices ? int64_t(list[i]) : i; };
  const int end = task.first_head + task.num_heads;
  for (int64_t i = task.first; i < task.last; ++i) {
    for (int head = task.first_head; head + 1 < end; ++head) split.attend(head, block(i), head + 1, block(i));
    split.attend(end - 1, block(i), task.first_head, block(i + 1));
  }
}

// Rows [num_rows, head_dim] of the result from the parts of the same sequence and heads.
template <class T>
void write_merged(const Part *parts, int64_t num_parts, int num_rows, int d, T *out, float *lse) {
  for (int row = 0; row < num_rows; ++row) {
    float peak = kLowest, sum = 0;
    for (int64_t i = 0; i < num_parts; ++i) peak = std::max(peak, parts[i].peak[row]);
    for (int64_t i = 0; i < num_parts; ++i) sum += parts[i].sum[row] * std::exp2(parts[i].peak[row] - peak);
    lse[row] = sum > 0 ? (peak + std::log2(sum)) * kLn2 : -kInfinity;
    for_each_channels(d, [&](auto width, int c) {
      Pair line = {};
      for (int64_t i = 0; i < num_parts && sum > 0; ++i) {
        const float weight = std::exp2(parts[i].peak[row] - peak) / sum;
        const Pair part = load_channels<width>(parts[i].out + row * d + c);
        line.half[0] += part.half[0] * weight;
        line.half[1] += part.half[1] * weight;
      }
      store_channels<width>(out + row * d + c, line);
    });
  }
}

template <class T>
void decode(const PagedKV &kv, const Queries &queries, const Lists &lists, const Outputs &to) {
  const std::vector<DecodeTask> tasks = decode_tasks(kv, lists);
  const int rows = queries.num_q_heads / kv.num_kv_heads * (lists.indices ? 1 : kv.num_kv_heads), d = kv.head_dim;
  std::vector<float> memory(tasks.size() * rows * (d + 2));
  std::vector<Part> parts(tasks.size());
  for (size_t i = 0; i < tasks.size(); ++i) {
    float *at = memory.data() + i * rows * (d + 2);
    parts[i] = {at, at + rows * d, at + rows * (d + 1)};
  }
  parallel_for(int64_t(tasks.size()), kv.num_threads,
               [&](int64_t i) { attend_task<T>(kv, queries, lists, tasks[i], parts[i]); });
  int64_t row = 0;  // rows of out are (sequence, head), which tasks enumerate in order
  for (size_t first = 0, next; first < tasks.size(); first = next, row += rows) {
    for (next = first + 1; next < tasks.size() && tasks[next].first > 0;) ++next;
    write_merged(parts.data() + first, int64_t(next - first), rows, d, static_cast<T *>(to.out) + row * d,
                 to.lse + row);
  }
}

}  // namespace
