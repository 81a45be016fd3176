// What a draw needs of all logits: the sum of their weights.
#pragma once
#include <cmath>

#include "simd.h"

namespace {

// Sum of exp(x / temperature) over x <= 0. In float32, but for the sums of every 32 vectors: theirs is double.
double sum_of_weights(const float *x, int64_t count, double temperature) {
  constexpr int64_t kStretch = 32 * kLanes;
  const float factor = float(1.4426950408889634 / temperature);
  double total = 0;
  int64_t i = 0;
  while (i + kLanes <= count) {
    Vec sum = {};
    for (const int64_t end = std::min(i + kStretch, count - kLanes + 1); i < end; i += kLanes)
      sum += exp2_of(load<Vec>(x + i) * factor);
    total += horizontal_sum(sum);
  }
  for (; i < count; ++i) total += std::exp2(x[i] * factor);
  return total;
}

}  // namespace
