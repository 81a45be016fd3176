// Vectors of floats by the compiler's own vector types (GCC 12 or clang): one source for AVX2, AVX-512 and
// whatever else; KVR_LANES and the -m flags decide. bfloat16 is widened to float32 on load.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

namespace {

constexpr int kLanes = KVR_LANES;
typedef float Vec __attribute__((vector_size(4 * KVR_LANES)));
typedef int32_t IVec __attribute__((vector_size(4 * KVR_LANES)));
typedef float Vec8 __attribute__((vector_size(32)));
typedef int32_t IVec8 __attribute__((vector_size(32)));
typedef uint32_t Word8 __attribute__((vector_size(32)));

template <class V>
struct IntOf;
template <>
struct IntOf<Vec8> {
  using type = IVec8;
};
#if KVR_LANES != 8
template <>
struct IntOf<Vec> {
  using type = IVec;
};
#endif

struct BFloat16 {
  uint16_t bits;
};

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = -3.0e38f;  // a running maximum before the first key: finite, so no inf - inf

template <class V>
inline V load(const float *p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline Vec8 load8(const float *p) { return load<Vec8>(p); }

inline Vec8 load8(const BFloat16 *p) {
  typedef uint16_t Half8 __attribute__((vector_size(16)));
  Half8 half;
  memcpy(&half, p, sizeof half);
  const Word8 bits = __builtin_convertvector(half, Word8) << 16;
  return (Vec8)bits;
}

template <class V>
inline void store(float *p, V v) {
  memcpy(p, &v, sizeof v);
}

inline void store8(float *p, Vec8 v) { store(p, v); }

// The upper halves, in the lower: round to nearest, ties to even. NaN stays NaN.
inline Word8 rounded_words(Vec8 v) {
  const Word8 bits = (Word8)v;
  const Word8 nan = (Word8)(v != v);
  return (((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & ~nan) | (nan & 0x7fc0);
}

inline void store8(BFloat16 *p, Vec8 v) {
  typedef uint16_t Half8 __attribute__((vector_size(16)));
  const Half8 half = __builtin_convertvector(rounded_words(v), Half8);
  memcpy(p, &half, sizeof half);
}

// Sixteen channels as two vectors: of bfloat16 the even and the odd ones, for one load, a shift and a mask.
// Eight channels (the end of a head_dim such as 72) are one vector in order.
struct Pair {
  Vec8 half[2];
};

inline Pair load16(const float *p) { return {load8(p), load8(p + 8)}; }

inline Pair load16(const BFloat16 *p) {
  Word8 words;
  memcpy(&words, p, sizeof words);
  return {(Vec8)(words << 16), (Vec8)(words & 0xffff0000)};
}

inline void store16(float *p, Pair pair) {
  store8(p, pair.half[0]);
  store8(p + 8, pair.half[1]);
}

inline void store16(BFloat16 *p, Pair pair) {
  const Word8 words = rounded_words(pair.half[0]) | rounded_words(pair.half[1]) << 16;
  memcpy(p, &words, sizeof words);
}

template <int N, class T>
inline Pair load_channels(const T *p) {
  if constexpr (N == 16) return load16(p);
  else return {load8(p), Vec8{}};
}

template <int N, class T>
inline void store_channels(T *p, Pair pair) {
  if constexpr (N == 16) store16(p, pair);
  else store8(p, pair.half[0]);
}

// f(integral_constant 16 or 8, first channel) over the channels of a row.
template <class F>
inline void for_each_channels(int head_dim, F f) {
  int c = 0;
  for (; c + 16 <= head_dim; c += 16) f(std::integral_constant<int, 16>{}, c);
  if (c < head_dim) f(std::integral_constant<int, 8>{}, c);
}

template <class V>
inline V maximum(V a, V b) {
  return a > b ? a : b;
}

template <class V>
inline V minimum(V a, V b) {
  return a < b ? a : b;
}

// 2^x for x <= 0 within 2 ulp; 0 below 2^-126, -inf included. Polynomial of Cephes exp2f.
template <class V>
inline V exp2_of(V x) {
  using I = typename IntOf<V>::type;
  x = maximum(x, V{} - 127.0f);
  const V shifted = x + 12582912.0f;  // 1.5 * 2^23: the integer part lands in the low mantissa bits
  const V r = x - (shifted - 12582912.0f);
  V p = r * 1.535336188319500e-4f + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
  const I exponent = ((I)shifted << 23) + 0x3f800000;  // -127 gives bits 0, hence 0
  return p * (V)exponent;
}

template <class V>
inline float horizontal_sum(V v) {
  float sum = 0;
  for (size_t i = 0; i < sizeof(V) / 4; ++i) sum += v[i];
  return sum;
}

// Scratch memory of the calling thread, one growing buffer per use.
enum ScratchUse { kQueries, kOutput, kScores, kState, kRowsK, kRowsV, kMasses, kBounds, kWeights, kNumUses };

inline float *scratch(ScratchUse use, size_t floats) {
  struct Buffer {
    float *data = nullptr;
    size_t size = 0;
    ~Buffer() { free(data); }
  };
  static thread_local Buffer buffers[kNumUses];
  Buffer &buffer = buffers[use];
  if (buffer.size < floats) {
    free(buffer.data);
    buffer.size = (floats + 63) / 64 * 64;
    buffer.data = static_cast<float *>(aligned_alloc(64, buffer.size * sizeof(float)));
  }
  return buffer.data;
}

}  // namespace
