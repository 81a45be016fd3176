// Reads a paged batch: lengths, pages, and whether they fit together. All checks run before any kernel.
#pragma once
#include <algorithm>

#include "api.h"
#include "simd.h"

namespace {

struct Sequence {
  int64_t num_tokens, first_row, q_len;
  const int32_t *table;
  int64_t offset() const { return num_tokens - q_len; }
  int64_t num_pages() const { return (num_tokens + 63) / 64; }
};

// A decode sequence without tokens has q_len 0.
inline Sequence sequence_of(const PagedKV &kv, const int32_t *cu_seqlens_q, int64_t b) {
  const int64_t tokens = kv.seq_lens[b];
  const int32_t *table = kv.block_table + b * kv.table_stride;
  if (!cu_seqlens_q) return {tokens, b, tokens > 0, table};
  return {tokens, cu_seqlens_q[b], cu_seqlens_q[b + 1] - cu_seqlens_q[b], table};
}

inline Status check_batch(const PagedKV &kv, const Queries *queries) {
  const int32_t *cu = queries ? queries->cu_seqlens_q : nullptr;
  if (cu && (cu[0] != 0 || cu[kv.batch] != queries->total_q)) return kBadLengths;
  for (int64_t b = 0; b < kv.batch; ++b) {
    const Sequence s = sequence_of(kv, cu, b);
    if (s.num_tokens < 0 || s.q_len < 0 || s.num_pages() > kv.max_blocks) return kBadLengths;
    if (queries && s.q_len > s.num_tokens) return kBadLengths;
    for (int64_t page = 0; page < s.num_pages(); ++page)
      if (s.table[page] < 0 || s.table[page] >= kv.num_blocks) return kBadTable;
  }
  return kOk;
}

// Sparse chunks start at multiples of 64 and list blocks of their own sequence only.
inline Status check_lists(const PagedKV &kv, const Queries &queries, const Lists &lists) {
  for (int64_t b = 0; b < kv.batch; ++b) {
    const Sequence s = sequence_of(kv, queries.cu_seqlens_q, b);
    if (queries.cu_seqlens_q && s.q_len > 0 && s.offset() % 64) return kBadLengths;
    const int64_t query_blocks = (s.q_len + 63) / 64;
    const int64_t first = lists.cu_q_blocks[b] * int64_t(kv.num_kv_heads);
    if (lists.cu_q_blocks[b] < 0 || lists.cu_q_blocks[b + 1] - lists.cu_q_blocks[b] < query_blocks)
      return kBadSelection;
    for (int64_t row = first; row < first + query_blocks * kv.num_kv_heads; ++row) {
      if (lists.counts[row] < 0 || lists.counts[row] > lists.budget) return kBadSelection;
      for (int32_t i = 0; i < lists.counts[row]; ++i) {
        const int32_t block = lists.indices[row * lists.budget + i];
        if (block < -1 || block >= s.num_pages()) return kBadSelection;
      }
    }
  }
  return kOk;
}

template <class T>
inline const T *tile_of(const void *pages, const int64_t *stride, int64_t page, int64_t head) {
  return static_cast<const T *>(pages) + page * stride[0] + head * stride[1];
}

}  // namespace
