// A tile of queries that rows of memory are scored by, whoever asks: in lanes, or one by one if they are few.
#pragma once
#include "dot_rows.h"
#include "lanes.h"

namespace {

// Queries that rows are scored by; fill(lane, line[head_dim]) gives each. Transposed into panels, or one by
// one as they are if they would not even fill a vector.
struct LaneTile {
  int lanes, padded, head_dim;
  float *data;

  template <class F>
  LaneTile(int num, int d, float *memory, float *line, F fill)
      : lanes(num), padded(padded_lanes(num)), head_dim(d), data(memory) {
    for (int lane = 0; lane < lanes && few(); ++lane) fill(lane, data + size_t(lane) * d);
    if (few()) return;
    for_each_lane(padded, d, [&](int lane, int base, int stride) {
      std::fill(line, line + d, 0.0f);
      if (lane < lanes) fill(lane, line);
      for (int c = 0; c < d; ++c) data[base + c * stride] = line[c];
    });
  }

  bool few() const { return lanes <= 8; }

  // scores [n, padded] (+)= rows . queries
  template <bool kAdd>
  void score(const Rows &rows, float *scores) const {
    if (few()) return score_few<kAdd>(rows, scores);
    for_each_panel(padded, [&](auto nv, int first) {
      score_panel<decltype(nv)::value, kAdd>(rows, rows.n, data + size_t(first) * head_dim, head_dim,
                                             scores + first, padded);
    });
  }

  // f(first lane, width, scores [n, width]) for each panel of lanes, scores lying at `to + first * kBlock`
  template <class F>
  void score_by_panel(const Rows &rows, float *to, F f) const {
    if (few()) {
      score_few<false>(rows, to);
      return f(0, padded, to);
    }
    for_each_panel(padded, [&](auto nv, int first) {
      constexpr int width = decltype(nv)::value * kLanes;
      float *scores = to + size_t(first) * kBlock;
      score_panel<decltype(nv)::value, false>(rows, rows.n, data + size_t(first) * head_dim, head_dim, scores, width);
      f(first, width, scores);
    });
  }

 private:
  template <bool kAdd>
  void score_few(const Rows &rows, float *scores) const {
    if (!kAdd) std::fill(scores, scores + size_t(rows.n) * padded, 0.0f);
    for_each_heads(lanes, [&](auto heads, int first) {
      constexpr int K = 8 / heads;
      const auto add = [&](int i, const float *products) {
        for (int j = 0; j < K && i + j < rows.n; ++j)
          for (int h = 0; h < heads; ++h) scores[(i + j) * padded + first + h] += products[h * K + j];
      };
      dot_rows<heads>(data + size_t(first) * head_dim, head_dim, rows.n, [&](int i) { return rows.at[i]; }, add);
    });
  }
};

}  // namespace
