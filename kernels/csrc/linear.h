// Linear layers on weights packed once at load. Outputs lie in vector lanes; each output of each row is a sum
// over blocks of kInputBlock inputs, in order, each a chain of fused multiply-adds, whatever the batch and
// the threads. A row's result is therefore the same to the last bit alone, in any batch, in decode and in
// prefill. (Blocks also halve the rounding error of one long chain.)
//
// Layout: panels of kPanel outputs, [num_in][kPanel]; for bfloat16 two inputs share a word, [num_in / 2]
// [kPanel][2], so that widening is a shift or a mask. The last panels are filled up with zeros to a pair.
#pragma once
#include <algorithm>
#include <type_traits>

#include "api.h"
#include "simd.h"
#include "threads.h"

namespace {

constexpr int kPanel = 2 * kLanes;
constexpr int kPair = 2 * kPanel;  // outputs of the smallest task: with gate and up interleaved, both of them
constexpr int kTileRows = 6;       // 12 accumulators, 2 weights and a broadcast fit 16 registers
constexpr int kInputBlock = 192;   // even; a widened panel of so many inputs stays in the first-level cache

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

inline int64_t num_pairs(const Linear &linear) { return round_up(linear.num_out, kPair) / kPair; }

// Input rows [rows][stride].
struct Inputs {
  const float *data;
  int64_t rows, stride;
};

template <class T>
const T *panel_of(const Linear &linear, int64_t panel, int64_t input) {
  return static_cast<const T *>(linear.weight) + (panel * linear.num_in + input) * kPanel;
}

typedef uint32_t UVec __attribute__((vector_size(4 * KVR_LANES)));

// The weights of inputs k and k + 1 of half a panel.
inline void load_two(const float *panel, int half, Vec &first, Vec &second) {
  first = load<Vec>(panel + half * kLanes);
  second = load<Vec>(panel + kPanel + half * kLanes);
}

inline void load_two(const BFloat16 *panel, int half, Vec &first, Vec &second) {
  UVec words;
  memcpy(&words, panel + half * 2 * kLanes, sizeof words);
  first = (Vec)(words << 16);
  second = (Vec)(words & 0xffff0000u);
}

// Few rows: weights are widened in registers on their way from memory. P panels into tile[r][stride].
template <int R, int P, class T>
void few_rows(const Inputs &x, const T *weights, int64_t num_in, float *tile, int tile_stride) {
  constexpr int64_t ahead = 2048;  // bytes: memory streams at full speed only if asked well ahead
  constexpr int64_t step_bytes = 2 * kPanel * sizeof(T);
  const int64_t next = num_in * kPanel;
  Vec sums[R][2 * P] = {};
  for (int64_t block = 0; block < num_in; block += kInputBlock) {
    Vec acc[R][2 * P] = {};
    for (int64_t k = block; k < std::min(block + kInputBlock, num_in); k += 2)
      for (int p = 0; p < P; ++p) {
        const T *at = weights + p * next + k * kPanel;
        for (int64_t line = 0; line < step_bytes; line += 64)
          __builtin_prefetch(reinterpret_cast<const char *>(at) + ahead + line, 0, 3);
        for (int half = 0; half < 2; ++half) {
          Vec first, second;
          load_two(at, half, first, second);
          for (int r = 0; r < R; ++r) {
            Vec &sum = acc[r][p * 2 + half];
            sum += x.data[r * x.stride + k] * first;
            sum += x.data[r * x.stride + k + 1] * second;
          }
        }
      }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < 2 * P; ++v) sums[r][v] += acc[r][v];
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2 * P; ++v) store(tile + r * tile_stride + v * kLanes, sums[r][v]);
}

// One pair of panels into tile[r][kPair], in as many registers as there are.
template <int R, class T>
void few_rows_of_pair(const Inputs &x, const Linear &linear, int64_t pair, float *tile) {
  const T *weights = panel_of<T>(linear, pair * 2, 0);
  if constexpr (R <= 3) {
    few_rows<R, 2>(x, weights, linear.num_in, tile, kPair);
  } else {
    few_rows<R, 1>(x, weights, linear.num_in, tile, kPair);
    few_rows<R, 1>(x, weights + linear.num_in * kPanel, linear.num_in, tile + kPanel, kPair);
  }
}

// Many rows: one block of inputs of one widened panel, which stays in cache; added to the tile.
template <int R>
void tile_rows(const float *x, int64_t stride, const float *panel, int64_t num_in, float *tile) {
  Vec acc[R][2] = {};
  for (int64_t k = 0; k < num_in; ++k) {
    const Vec first = load<Vec>(panel + k * kPanel), second = load<Vec>(panel + k * kPanel + kLanes);
    for (int r = 0; r < R; ++r) {
      acc[r][0] += x[r * stride + k] * first;
      acc[r][1] += x[r * stride + k] * second;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) {
      float *to = tile + r * kPair + v * kLanes;
      store(to, load<Vec>(to) + acc[r][v]);
    }
}

// f(integral_constant) of a count from 1 to Most.
template <int Most, class F>
void with_count(int64_t count, F f) {
  if constexpr (Most > 1)
    if (count < Most) return with_count<Most - 1>(count, f);
  f(std::integral_constant<int, Most>{});
}

inline const float *widened(const float *panel, int64_t, float *) { return panel; }

inline const float *widened(const BFloat16 *panel, int64_t num_in, float *to) {
  for (int64_t k = 0; k < num_in; k += 2)
    for (int half = 0; half < 2; ++half) {
      Vec first, second;
      load_two(panel + k * kPanel, half, first, second);
      store(to + k * kPanel + half * kLanes, first);
      store(to + (k + 1) * kPanel + half * kLanes, second);
    }
  return to;
}

// Rows of a register tile such that all tiles of `rows` are about as full: a tile of two costs as much as four.
inline int64_t even_rows(int64_t rows) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  return (rows + tiles - 1) / tiles;
}

// tile[rows][kPair] of one pair of panels.
template <class T>
void many_rows(const Inputs &x, const Linear &linear, int64_t pair, float *tile) {
  alignas(64) float wide[kInputBlock * kPanel];
  const int64_t together = even_rows(x.rows);
  std::fill(tile, tile + x.rows * kPair, 0.0f);
  for (int64_t input = 0; input < linear.num_in; input += kInputBlock) {
    const int64_t num_in = std::min<int64_t>(kInputBlock, linear.num_in - input);
    for (int p = 0; p < 2; ++p) {
      const float *panel = widened(panel_of<T>(linear, pair * 2 + p, input), num_in, wide);
      for (int64_t row = 0; row < x.rows; row += together)
        with_count<kTileRows>(std::min(together, x.rows - row), [&](auto count) {
          const float *at = x.data + row * x.stride + input;
          tile_rows<decltype(count)::value>(at, x.stride, panel, num_in, tile + row * kPair + p * kPanel);
        });
    }
  }
}

// Hands a pair's outputs of one row to `store(row, first output, values, count)`, the bias added.
template <class Store>
void put(const Linear &linear, int64_t row, int64_t first, float *values, const Store &store) {
  const int64_t count = std::min<int64_t>(kPair, linear.num_out - first);
  if (linear.bias)
    for (int64_t i = 0; i < count; ++i) values[i] += linear.bias[first + i];
  store(row, first, values, count);
}

// One row takes two pairs at a time while there are many: eight chains hide the latency of a multiply-add.
template <class T, class Store>
void linear_one(const Inputs &x, const Linear &linear, int threads, const Store &store) {
  const int64_t pairs = num_pairs(linear), doubles = pairs > 2 ? (pairs - 2) / 2 : 0;
  parallel_for(pairs - doubles, threads, [&](int64_t task) {
    alignas(64) float tile[2 * kPair];
    const int64_t pair = task < doubles ? task * 2 : task + doubles;
    if (task < doubles)
      few_rows<1, 4>(x, panel_of<T>(linear, pair * 2, 0), linear.num_in, tile, 2 * kPair);
    else
      few_rows_of_pair<1, T>(x, linear, pair, tile);
    put(linear, 0, pair * kPair, tile, store);
    if (task < doubles) put(linear, 0, (pair + 1) * kPair, tile + kPair, store);
  });
}

template <class T, class Store>
void linear_few(const Inputs &x, const Linear &linear, int threads, const Store &store) {
  parallel_for(num_pairs(linear), threads, [&](int64_t pair) {
    alignas(64) float tile[kTileRows * kPair];
    with_count<kTileRows>(x.rows, [&](auto rows) {
      few_rows_of_pair<decltype(rows)::value, T>(x, linear, pair, tile);
    });
    for (int64_t r = 0; r < x.rows; ++r) put(linear, r, pair * kPair, tile + r * kPair, store);
  });
}

template <class T, class Store>
void linear_many(const Inputs &x, const Linear &linear, int threads, const Store &store) {
  const int64_t fitting = (384 << 10) / (int64_t(sizeof(float)) * linear.num_in);  // in the second-level cache
  const int64_t block = std::clamp<int64_t>(fitting / kTileRows * kTileRows, 48, 96), pairs = num_pairs(linear);
  parallel_for((x.rows + block - 1) / block * pairs, threads, [&](int64_t task) {
    alignas(64) float tile[96 * kPair];
    const int64_t first = task / pairs * block, pair = task % pairs;
    const Inputs rows{x.data + first * x.stride, std::min(block, x.rows - first), x.stride};
    many_rows<T>(rows, linear, pair, tile);
    for (int64_t r = 0; r < rows.rows; ++r) put(linear, first + r, pair * kPair, tile + r * kPair, store);
  });
}

// `weights` [num_out, num_in] in rows to panels; `to` has room for num_pairs() * kPair outputs.
template <class T>
void pack(const T *weights, const Linear &linear, T *to, int threads) {
  constexpr int together = std::is_same_v<T, float> ? 1 : 2;
  parallel_for(num_pairs(linear) * 2, threads, [&](int64_t panel) {
    T *out = to + panel * linear.num_in * kPanel;
    for (int64_t k = 0; k < linear.num_in; ++k)
      for (int lane = 0; lane < kPanel; ++lane) {
        const int64_t row = panel * kPanel + lane;
        const int64_t at = k / together * together * kPanel + lane * together + k % together;
        out[at] = row < linear.num_out ? weights[row * linear.num_in + k] : T{};
      }
  });
}

// The inverse for one output: its weights in order, as float32.
inline void unpack(const Linear &linear, int64_t output, float *to) {
  const int64_t panel = output / kPanel, lane = output % kPanel;
  for (int64_t k = 0; k < linear.num_in; ++k)
    if (linear.dtype == kFloat32) {
      to[k] = panel_of<float>(linear, panel, k)[lane];
    } else {
      const uint32_t bits = panel_of<BFloat16>(linear, panel, k / 2 * 2)[lane * 2 + k % 2].bits;
      const uint32_t word = bits << 16;
      memcpy(to + k, &word, sizeof word);
    }
}

// store(row, first output, values, count) for every row and pair of panels, in no particular order.
template <class Store>
void linear(const Inputs &x, const Linear &linear, int threads, const Store &store) {
  const auto run = [&](auto type) {
    using T = decltype(type);
    if (x.rows == 1)
      linear_one<T>(x, linear, threads, store);
    else if (x.rows <= kTileRows)
      linear_few<T>(x, linear, threads, store);
    else
      linear_many<T>(x, linear, threads, store);
  };
  linear.dtype == kFloat32 ? run(float{}) : run(BFloat16{});
}

}  // namespace
