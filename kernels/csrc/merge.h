// Merges attention over disjoint sets of keys by log-sum-exp (FlashInfer, arXiv 2501.01005, sec. 2.2).
#pragma once
#include <cmath>

#include "simd.h"
#include "threads.h"

namespace {

// outs [splits, rows, head_dim], lses [splits, rows]; a split whose lse is -inf is ignored, NaN and all.
template <class T>
void merge(const T *outs, const float *lses, int64_t splits, int64_t rows, int64_t head_dim, int threads, T *out,
           float *lse) {
  constexpr int64_t kRows = 64;
  parallel_for((rows + kRows - 1) / kRows, threads, [&](int64_t part) {
    for (int64_t row = part * kRows; row < std::min(rows, (part + 1) * kRows); ++row) {
      float peak = -kInfinity, sum = 0;
      for (int64_t i = 0; i < splits; ++i) peak = std::max(peak, lses[i * rows + row]);
      for (int64_t i = 0; i < splits && peak > -kInfinity; ++i) sum += std::exp(lses[i * rows + row] - peak);
      lse[row] = peak + (sum > 0 ? std::log(sum) : 0);
      for (int64_t c = 0; c < head_dim; c += 8) {
        Vec8 line = {};
        for (int64_t i = 0; i < splits; ++i) {
          const float weight = sum > 0 ? std::exp(lses[i * rows + row] - peak) / sum : 0;
          if (weight > 0) line += load8(outs + (i * rows + row) * head_dim + c) * weight;
        }
        store8(out + row * head_dim + c, line);
      }
    }
  });
}

}  // namespace
