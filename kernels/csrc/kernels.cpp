// The exported functions: check the batch, then run the kernel of its dtype. Compiled once per instruction
// set into a library of its own, so that no code of one set can leak into another by the linker.
#include "block_stats.h"
#include "decode.h"
#include "merge.h"
#include "prefill.h"
#include "sampling.h"
#include "transformer.h"

#ifndef KVR_SOURCES
#define KVR_SOURCES 0
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

template <class F>
void with_dtype(int32_t dtype, F f) {
  if (dtype == kFloat32)
    f(float{});
  else
    f(BFloat16{});
}

Status check(const PagedKV &kv, const Queries &queries, const Lists &lists) {
  const Status status = check_batch(kv, &queries);
  return status == kOk && lists.indices ? check_lists(kv, queries, lists) : status;
}

}  // namespace

EXPORT int32_t kvr_supported() {
#if defined(__x86_64__) && KVR_LANES == 16
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#elif defined(__x86_64__) && KVR_LANES == 8
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 1;
#endif
}

EXPORT uint32_t kvr_sources() { return KVR_SOURCES; }

EXPORT int32_t kvr_prefill(const PagedKV *kv, const Queries *queries, const Lists *lists, const Outputs *to) {
  if (const Status status = check(*kv, *queries, *lists)) return status;
  with_dtype(kv->dtype, [&](auto type) { prefill<decltype(type)>(*kv, *queries, *lists, *to); });
  return kOk;
}

EXPORT int32_t kvr_decode(const PagedKV *kv, const Queries *queries, const Lists *lists, const Outputs *to) {
  if (const Status status = check(*kv, *queries, *lists)) return status;
  with_dtype(kv->dtype, [&](auto type) { decode<decltype(type)>(*kv, *queries, *lists, *to); });
  return kOk;
}

EXPORT int32_t kvr_merge(const void *outs, const float *lses, int64_t splits, int64_t rows, int64_t head_dim,
                         int32_t dtype, int32_t num_threads, void *out, float *lse) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    merge(static_cast<const T *>(outs), lses, splits, rows, head_dim, num_threads, static_cast<T *>(out), lse);
  });
  return kOk;
}

EXPORT int32_t kvr_update_stats(const PagedKV *kv, const Stats *stats, const int32_t *num_new_tokens) {
  if (const Status status = check_batch(*kv, nullptr)) return status;
  for (int64_t b = 0; b < kv->batch; ++b)
    with_dtype(kv->dtype, [&](auto type) { update_sequence<decltype(type)>(*kv, *stats, b, num_new_tokens[b]); });
  return kOk;
}

EXPORT int32_t kvr_select_tree(const PagedKV *kv, const Queries *queries, const Stats *stats,
                               const TreeConfig *config, const Lists *lists, const Outputs *to) {
  if (const Status status = check_batch(*kv, queries)) return status;
  for (int64_t b = 0; b < kv->batch && queries->cu_seqlens_q; ++b) {
    const Sequence s = sequence_of(*kv, queries->cu_seqlens_q, b);
    if (s.q_len > 0 && s.offset() % 64) return kBadLengths;
  }
  with_dtype(kv->dtype, [&](auto type) {
    using T = decltype(type);
    if (to)
      select_and_attend<T>(*kv, *queries, *stats, *config, *lists, *to);
    else if (!queries->cu_seqlens_q)
      select_by_row<T>(*kv, *queries, *stats, *config, *lists);
    else
      select_tree<T>(*kv, *queries, *stats, *config, *lists);
  });
  return kOk;
}

EXPORT int64_t kvr_panel() { return kPanel; }

EXPORT int32_t kvr_pack(const void *weights, const Linear *linear, void *to, int32_t num_threads) {
  with_dtype(linear->dtype, [&](auto type) {
    using T = decltype(type);
    pack(static_cast<const T *>(weights), *linear, static_cast<T *>(to), num_threads);
  });
  return kOk;
}

EXPORT int32_t kvr_linear(const float *x, int64_t rows, const Linear *weights, int32_t num_threads, float *out) {
  linear({x, rows, weights->num_in}, *weights, num_threads,
         [&](int64_t row, int64_t first, const float *values, int64_t count) {
           memcpy(out + row * weights->num_out + first, values, count * sizeof(float));
         });
  return kOk;
}

EXPORT int32_t kvr_embed(const Model *model, const int64_t *token_ids, int64_t rows, float *out) {
  for (int64_t r = 0; r < rows; ++r)
    if (token_ids[r] < 0 || token_ids[r] >= model->vocab) return kBadToken;
  for_rows(rows, model->num_threads,
           [&](int64_t r) { unpack(model->embedding, token_ids[r], out + r * model->hidden); });
  return kOk;
}

EXPORT int32_t kvr_rotary(const Model *model, const int64_t *positions, int64_t rows, float *out) {
  for_rows(rows, model->num_threads,
           [&](int64_t r) { rotary_row(*model, positions[r], out + r * model->head_dim); });
  return kOk;
}

EXPORT int32_t kvr_before_attention(const Model *model, int32_t layer, const float *hidden, const float *rotary,
                                    int64_t rows, float *qkv) {
  before_attention(*model, model->layers[layer], hidden, rotary, rows, qkv);
  return kOk;
}

EXPORT int32_t kvr_after_attention(const Model *model, int32_t layer, const float *attended, int64_t rows,
                                   float *hidden) {
  after_attention(*model, model->layers[layer], attended, rows, hidden);
  return kOk;
}

EXPORT int32_t kvr_last_norm(const Model *model, const float *hidden, int64_t rows, float *out) {
  norm_rows(*model, hidden, model->norm, rows, out);
  return kOk;
}

EXPORT int32_t kvr_step(const Model *model, const Step *step) {
  if (const Status status = check_step(*model, *step)) return status;
  with_dtype(step->kv_dtype, [&](auto type) { decode_step<decltype(type)>(*model, *step); });
  return kOk;
}

EXPORT double kvr_sum_of_weights(const float *x, int64_t count, double temperature) {
  return sum_of_weights(x, count, temperature);
}
