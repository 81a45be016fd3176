// Queries lie in vector lanes. A tile of queries is transposed once into panels [head_dim][lanes]; keys and
// values are then read in place, one broadcast element at a time, and softmax is vertical: no packing of K
// or V, no horizontal sums. Two micro-kernels (scores, accumulate) keep a register tile of kTile<NV> rows by
// NV vectors.
#pragma once
#include <type_traits>

#include "simd.h"

namespace {

constexpr int kBlock = 64;
constexpr int kPanelVectors = 3;

// Rows of a register tile: with NV vectors, 12 (AVX2) or 24 (AVX-512) accumulators, at least 8 for NV = 1.
template <int NV>
constexpr int kTile = KVR_LANES == 16 ? 8 : (NV == 1 ? 8 : 4);

// Vectors in the next panel when `left` remain; 4 splits into 2 + 2, as a panel of 1 is slow.
inline int panel_vectors(int left) { return left == 4 ? 2 : (left < kPanelVectors ? left : kPanelVectors); }

inline int padded_lanes(int lanes) { return (lanes + kLanes - 1) / kLanes * kLanes; }

// Call f(integral_constant NV, first lane) for each panel of `padded` lanes.
template <class F>
inline void for_each_panel(int padded, F f) {
  for (int first = 0; first < padded;) {
    const int vectors = panel_vectors((padded - first) / kLanes);
    if (vectors == 3) f(std::integral_constant<int, 3>{}, first);
    if (vectors == 2) f(std::integral_constant<int, 2>{}, first);
    if (vectors == 1) f(std::integral_constant<int, 1>{}, first);
    first += vectors * kLanes;
  }
}

// Where element (lane, channel) of a transposed tile lies, as a panel base and a stride.
template <class F>
inline void for_each_lane(int padded, int head_dim, F f) {
  for_each_panel(padded, [&](auto nv, int first) {
    constexpr int width = decltype(nv)::value * kLanes;
    for (int lane = 0; lane < width; ++lane) f(first + lane, first * head_dim + lane, width);
  });
}

// Up to 64 rows as float32 pointers; reads of float32 are in place. Pointers past `n` repeat the last row,
// so that a register tile may overrun.
struct Rows {
  const float *at[kBlock + 8];
  int n = 0;
};

template <class RowOf>
inline void gather(Rows &rows, int n, int head_dim, float *widened, RowOf row_of) {
  using T = std::remove_cv_t<std::remove_pointer_t<decltype(row_of(0))>>;
  for (int i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      rows.at[i] = row_of(i);
    } else {
      for (int c = 0; c < head_dim; c += 8) store8(widened + i * head_dim + c, load8(row_of(i) + c));
      rows.at[i] = widened + i * head_dim;
    }
  }
  for (int i = n; i < n + 8; ++i) rows.at[i] = rows.at[n - 1];
  rows.n = n;
}

// scores[i][lane] (+)= rows[i] . query[lane] for the panel's lanes, i < n.
template <int NV, bool kAdd>
inline void score_panel(const Rows &rows, int n, const float *panel, int head_dim, float *scores, int stride) {
  constexpr int R = kTile<NV>;
  for (int i = 0; i < n; i += R) {
    const float *row[R];
    Vec acc[R][NV] = {};
    for (int r = 0; r < R; ++r) row[r] = rows.at[i + r];
    for (int c = 0; c < head_dim; ++c) {
      Vec query[NV];
      for (int v = 0; v < NV; ++v) query[v] = load<Vec>(panel + c * NV * kLanes + v * kLanes);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < NV; ++v) acc[r][v] += row[r][c] * query[v];
    }
    for (int r = 0; r < R && i + r < n; ++r)
      for (int v = 0; v < NV; ++v) {
        float *to = scores + (i + r) * stride + v * kLanes;
        store(to, kAdd ? load<Vec>(to) + acc[r][v] : acc[r][v]);
      }
  }
}

// out[c][lane] = add(out[c][lane], sum over i < n of values[i][c] * weights[i][lane], vector of lanes). A block's
// sum is formed by itself first: errors then grow with the root of 64 plus the blocks, not of all keys.
template <int NV, class Add>
inline void accumulate_panel(const Rows &values, int n, const float *weights, int head_dim, float *out, Add add) {
  constexpr int R = kTile<NV>, width = NV * kLanes;
  for (int c = 0; c < head_dim; c += R) {
    Vec acc[R][NV] = {};
    for (int i = 0; i < n; ++i) {
      const float *value = values.at[i] + c;
      Vec weight[NV];
      for (int v = 0; v < NV; ++v) weight[v] = load<Vec>(weights + i * width + v * kLanes);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < NV; ++v) acc[r][v] += value[r] * weight[v];
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < NV; ++v) {
        float *to = out + (c + r) * width + v * kLanes;
        store(to, add(load<Vec>(to), acc[r][v], v));
      }
  }
}

}  // namespace
