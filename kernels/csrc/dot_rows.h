// Products of a few queries with many rows of memory, channels in vector lanes: for decode, where there are too
// few queries to fill lanes with them (see lanes.h).
#pragma once
#include "simd.h"

namespace {

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

// For i = 0, K, 2 K, ... below n, with K = 8 / H: put(i, products), products[h * K + j] = query h . row i + j.
// Rows past n repeat the last. Queries [H, head_dim] lie in the order that load_channels of a row gives.
template <int H, class RowOf, class Put>
inline void dot_rows(const float *query, int head_dim, int n, RowOf row_of, Put put) {
  constexpr int K = 8 / H;
  for (int i = 0; i < n; i += K) {
    decltype(row_of(0)) row[K];
    for (int j = 0; j < K; ++j) row[j] = row_of(i + j < n ? i + j : n - 1);
    Vec8 acc[8] = {};
    for_each_channels(head_dim, [&](auto width, int c) {
      Pair key[K];
      for (int j = 0; j < K; ++j) key[j] = load_channels<width>(row[j] + c);
      for (int part = 0; part < width / 8; ++part)
        for (int h = 0; h < H; ++h) {
          const Vec8 q = load8(query + h * head_dim + c + 8 * part);
          for (int j = 0; j < K; ++j) acc[h * K + j] += q * key[j].half[part];
        }
    });
    float products[8];
    store8(products, sums_of(acc));
    put(i, products);
  }
}

// f(integral_constant H, first head) over `heads` heads, four at a time.
template <class F>
inline void for_each_heads(int heads, F f) {
  int first = 0;
  for (; heads - first >= 4; first += 4) f(std::integral_constant<int, 4>{}, first);
  if (heads - first == 3) f(std::integral_constant<int, 3>{}, first);
  if (heads - first == 2) f(std::integral_constant<int, 2>{}, first);
  if (heads - first == 1) f(std::integral_constant<int, 1>{}, first);
}

}  // namespace
