// Vectors of 16 numbers and what the kernels do with them. A compiler for narrower registers cuts them up.
//
// Everything here takes one order of operations whatever surrounds it, so that a number's bits depend on its operands.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace jaxserve {

constexpr int kLanes = 16;
using Vector = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));
using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));

template <typename V, typename T>
inline V load(const T* from) {
  V out;
  std::memcpy(&out, from, sizeof(V));
  return out;
}

template <typename V, typename T>
inline void store(T* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

inline Vector spread(float value) { return Vector{} + value; }

inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

using Half = float __attribute__((vector_size(32)));
using Quarter = float __attribute__((vector_size(16)));

// `combine` of all numbers of a vector, by halves: of i and i + 8, of i and i + 4, of i and i + 2, of the last two.
template <typename Combine>
inline float reduce(Vector v, Combine combine) {
  const Half half = combine(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                            __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
  const Quarter quarter = combine(__builtin_shufflevector(half, half, 0, 1, 2, 3),
                                  __builtin_shufflevector(half, half, 4, 5, 6, 7));
  return combine(combine(quarter[0], quarter[2]), combine(quarter[1], quarter[3]));
}

inline float largest(Vector v) {
  return reduce(v, [](auto a, auto b) { return a > b ? a : b; });
}

inline float sum(Vector v) {
  return reduce(v, [](auto a, auto b) { return a + b; });
}

// exp(x), at most 2 units in the last place off; 0 below -87.3, where float32 has no normal numbers; NaN of NaN.
// Source: Cephes' expf (S. Moshier): x = n ln 2 + r, a polynomial in r, times 2^n.
inline Vector exp(Vector x) {
  constexpr float kLowest = -87.3f, kHighest = 88.7f;
  const Ints is_zero = x < kLowest;
  x = is_zero ? spread(kLowest) : x;
  x = x > kHighest ? spread(kHighest) : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits for a fraction
  const Vector shifted = x * 1.44269504088896341f + kRound;
  const Vector n = shifted - kRound;
  Vector r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vector y = spread(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const Vector power = (Vector)(((Ints)shifted + 127) << 23);  // the low bits of `shifted` are n
  y = y * power;
  return is_zero ? Vector{} : y;
}

// tanh(x) = 1 - 2 / (exp(2x) + 1).
inline Vector tanh(Vector x) { return 1.0f - 2.0f / (exp(x + x) + 1.0f); }

// The nearest bfloat16, ties to even, in the low half of each word; NaN stays NaN.
inline Words round_to_bfloat16(Vector x) {
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return x == x ? rounded : (bits >> 16) | 0x40u;
}

inline Words widen(Halves halves) { return __builtin_convertvector(halves, Words); }
inline Halves narrow(Words words) { return __builtin_convertvector(words, Halves); }

// Turns 16 vectors of 16 words: what was word c of vector r becomes word r of vector c. Four perfect shuffles, each of
// which rotates the eight bits of an element's place by one.
inline void transpose(Words (&rows)[kLanes]) {
  for (int round = 0; round < 4; ++round) {
    Words next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      const Words a = rows[i], b = rows[i + kLanes / 2];
      next[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

}  // namespace jaxserve
