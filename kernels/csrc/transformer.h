// A decoder's layers around attention, and a whole decode step in one call: embedding, norms, linear layers,
// rotary embedding, K and V into their pages, attention, logits. All arithmetic is float32. Rows never mix,
// so what is said of linear layers in linear.h holds for all of it.
#pragma once
#include <cmath>
#include <vector>

#include "block_stats.h"
#include "decode.h"
#include "linear.h"
#include "selecting.h"

namespace {

// sum over the row in an order that depends on its length only.
inline float sum_of_squares(const float *x, int64_t n) {
  Vec sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)
    for (int j = 0; j < 2; ++j) {
      const Vec v = load<Vec>(x + i + j * kLanes);
      sums[j] += v * v;
    }
  float sum = horizontal_sum(sums[0] + sums[1]);
  for (; i < n; ++i) sum += x[i] * x[i];
  return sum;
}

// Root-mean-square norm of one row (arXiv:1910.07467); `out` may be `x`.
inline void rms_norm(const float *x, const float *weight, int64_t n, float eps, float *out) {
  const float scale = 1.0f / std::sqrt(sum_of_squares(x, n) / float(n) + eps);
  for (int64_t i = 0; i < n; ++i) out[i] = weight[i] * (x[i] * scale);
}

// x / (1 + e^-x)
inline Vec silu(Vec x) {
  const Vec magnitude = maximum(x, -x), small = exp2_of(magnitude * -kLog2e);
  return x * (x < 0.0f ? small : Vec{} + 1.0f) / (1.0f + small);
}

// Pairs (i, i + n / 2) turned by the angles of `rotary` [cos n / 2][sin n / 2].
inline void rotate(float *x, const float *rotary, int n) {
  const int half = n / 2;
  for (int i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half], cosine = rotary[i], sine = rotary[i + half];
    x[i] = first * cosine - second * sine;
    x[i + half] = second * cosine + first * sine;
  }
}

// A few rows are not worth waking anybody for.
template <class F>
void for_rows(int64_t rows, int threads, F f) {
  parallel_for(rows, rows < 16 ? 1 : threads, f);
}

inline void norm_rows(const Model &m, const float *x, const float *weight, int64_t rows, float *out) {
  for_rows(rows, m.num_threads,
           [&](int64_t r) { rms_norm(x + r * m.hidden, weight, m.hidden, m.eps, out + r * m.hidden); });
}

inline int64_t qkv_width(const Model &m) { return int64_t(m.num_q_heads + 2 * m.num_kv_heads) * m.head_dim; }

inline void rotary_row(const Model &m, int64_t position, float *out) {
  const int half = m.head_dim / 2;
  for (int i = 0; i < half; ++i) {
    const float angle = float(position) * m.inverse_frequencies[i];
    out[i] = std::cos(angle) * m.rotary_factor;
    out[i + half] = std::sin(angle) * m.rotary_factor;
  }
}

// hidden [rows, hidden] -> qkv [rows, q then k then v], q and k normed and rotated.
inline void before_attention(const Model &m, const Layer &layer, const float *hidden, const float *rotary,
                             int64_t rows, float *qkv) {
  const int64_t width = qkv_width(m);
  std::vector<float> normed(rows * m.hidden);
  norm_rows(m, hidden, layer.input_norm, rows, normed.data());
  linear({normed.data(), rows, m.hidden}, layer.qkv, m.num_threads,
         [&](int64_t row, int64_t first, const float *values, int64_t count) {
           memcpy(qkv + row * width + first, values, count * sizeof(float));
         });
  for_rows(rows, m.num_threads, [&](int64_t r) {
    for (int head = 0; head < m.num_q_heads + m.num_kv_heads; ++head) {
      float *x = qkv + r * width + head * m.head_dim;
      if (layer.qk_norm) rms_norm(x, layer.qk_norm + head * m.head_dim, m.head_dim, m.eps, x);
      rotate(x, rotary + r * m.head_dim, m.head_dim);
    }
  });
}

// attended [rows, q] -> hidden += output projection, then += MLP (SwiGLU, arXiv:2002.05202).
inline void after_attention(const Model &m, const Layer &layer, const float *attended, int64_t rows,
                            float *hidden) {
  const auto add = [&](int64_t row, int64_t first, const float *values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) hidden[row * m.hidden + first + i] += values[i];
  };
  linear({attended, rows, int64_t(m.num_q_heads) * m.head_dim}, layer.output, m.num_threads, add);
  std::vector<float> normed(rows * m.hidden), active(rows * m.intermediate);
  norm_rows(m, hidden, layer.mlp_norm, rows, normed.data());
  linear({normed.data(), rows, m.hidden}, layer.gate_up, m.num_threads,
         [&](int64_t row, int64_t first, const float *values, int64_t) {
           alignas(64) float product[kPanel];
           for (int i = 0; i < kPanel; i += kLanes)
             store(product + i, silu(load<Vec>(values + i)) * load<Vec>(values + kPanel + i));
           const int64_t count = std::min<int64_t>(kPanel, m.intermediate - first / 2);
           memcpy(&active[row * m.intermediate + first / 2], product, count * sizeof(float));
         });
  linear({active.data(), rows, m.intermediate}, layer.down, m.num_threads, add);
}

// Writes one row's k and v into the page of the sequence's last token.
template <class T>
void store_kv(const Model &m, const PagedKV &kv, int64_t sequence, const float *k, const float *v) {
  const int64_t last = kv.seq_lens[sequence] - 1;
  const int64_t page = kv.block_table[sequence * kv.table_stride + last / kBlock];
  for (int head = 0; head < m.num_kv_heads; ++head) {
    T *to_k = const_cast<T *>(tile_of<T>(kv.k, kv.k_stride, page, head)) + last % kBlock * kv.k_stride[2];
    T *to_v = const_cast<T *>(tile_of<T>(kv.v, kv.v_stride, page, head)) + last % kBlock * kv.v_stride[2];
    for (int c = 0; c < m.head_dim; c += 8) {
      store8(to_k + c, load8(k + head * m.head_dim + c));
      store8(to_v + c, load8(v + head * m.head_dim + c));
    }
  }
}

inline PagedKV pages_of(const Model &m, const Step &step, int layer) {
  PagedKV kv{};
  kv.k = step.k_pages[layer], kv.v = step.v_pages[layer];
  std::copy_n(step.k_stride, 3, kv.k_stride), std::copy_n(step.v_stride, 3, kv.v_stride);
  kv.block_table = step.block_table, kv.seq_lens = step.seq_lens;
  kv.table_stride = step.table_stride, kv.batch = step.batch;
  kv.max_blocks = step.max_blocks, kv.num_blocks = step.num_blocks;
  kv.num_kv_heads = m.num_kv_heads, kv.head_dim = m.head_dim;
  kv.dtype = step.kv_dtype, kv.num_threads = m.num_threads;
  return kv;
}

// The one place where a decode step attends: qkv [batch, q then k then v] -> attended [batch, q]. Queries
// and results take the dtype of the pages, as in prefill.
template <class T>
void attend(const Model &m, const Step &step, int layer, SelectedBatch &selected, const float *qkv, float *attended) {
  const PagedKV kv = pages_of(m, step, layer);
  const int64_t q_width = int64_t(m.num_q_heads) * m.head_dim, kv_width = int64_t(m.num_kv_heads) * m.head_dim;
  const int64_t width = qkv_width(m);
  std::vector<T> q(kv.batch * q_width), out(kv.batch * q_width);
  std::vector<float> lse(kv.batch * m.num_q_heads);
  for (int64_t b = 0; b < kv.batch; ++b) {
    const float *row = qkv + b * width;
    store_kv<T>(m, kv, b, row + q_width, row + q_width + kv_width);
    for (int64_t c = 0; c < q_width; c += 8) store8(&q[b * q_width + c], load8(row + c));
  }
  for (int64_t b = 0; b < kv.batch && step.stats; ++b) update_sequence<T>(kv, step.stats[layer], b, 1);
  const float scale = float(1.0 / std::sqrt(double(m.head_dim)));  // to the bit what layers one by one get
  const Queries queries{q.data(), {q_width, m.head_dim}, nullptr, kv.batch, m.num_q_heads, scale};
  if (selected.selects(layer))
    selected.attend<T>(kv, layer, q.data(), scale, out.data());
  else
    decode<T>(kv, queries, Lists{}, Outputs{out.data(), lse.data()});
  for (int64_t c = 0; c < kv.batch * q_width; c += 8) store8(attended + c, load8(&out[c]));
}

inline Status check_step(const Model &m, const Step &step) {
  for (int64_t b = 0; b < step.batch; ++b) {
    if (step.token_ids[b] < 0 || step.token_ids[b] >= m.vocab) return kBadToken;
    if (step.seq_lens[b] < 1) return kBadLengths;
  }
  return check_batch(pages_of(m, step, 0), nullptr);
}

// One token for each sequence of the batch: its K and V into the pages, its logits out.
template <class T>
void decode_step(const Model &m, const Step &step) {
  const int64_t rows = step.batch;
  std::vector<float> hidden(rows * m.hidden), qkv(rows * qkv_width(m)), rotary(rows * m.head_dim);
  std::vector<float> attended(rows * m.num_q_heads * m.head_dim);
  SelectedBatch selected(m, step);
  for (int64_t r = 0; r < rows; ++r) {
    unpack(m.embedding, step.token_ids[r], &hidden[r * m.hidden]);
    rotary_row(m, step.seq_lens[r] - 1, &rotary[r * m.head_dim]);
  }
  for (int layer = 0; layer < m.num_layers; ++layer) {
    before_attention(m, m.layers[layer], hidden.data(), rotary.data(), rows, qkv.data());
    attend<T>(m, step, layer, selected, qkv.data(), attended.data());
    after_attention(m, m.layers[layer], attended.data(), rows, hidden.data());
  }
  norm_rows(m, hidden.data(), m.norm, rows, hidden.data());
  linear({hidden.data(), rows, m.hidden}, m.head, m.num_threads,
         [&](int64_t row, int64_t first, const float *values, int64_t count) {
           memcpy(step.logits + row * m.vocab + first, values, count * sizeof(float));
         });
}

}  // namespace
