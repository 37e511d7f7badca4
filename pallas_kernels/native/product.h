// The one product that all kernels are made of: a few rows times a panel of 32 columns, accumulated in float32.
//
// A number of the result is one chain of multiply-adds over the depth, in order, in an accumulator of its own. How many
// rows go together decides how fast it is and no bit.
#pragma once

#include "vector.h"

namespace jaxserve {

constexpr int kWidth = 2 * kLanes;  // columns of a panel
#if defined(__AVX512F__)
constexpr int kMaxRows = 12;  // 24 accumulators of 32 registers, two of the panel, one of the rows
#elif defined(__aarch64__)
constexpr int kMaxRows = 3;  // 24 of 32
#else
constexpr int kMaxRows = 1;  // 8 of 16
#endif

// A type of operands. `Unit` is what one step of the depth takes of a row and of each column.
struct Float32 {
  using Unit = float;
  static constexpr int kDepth = 1;  // numbers of a unit

  static Vector add(Vector sum, Unit row, const Unit* columns) { return sum + spread(row) * load<Vector>(columns); }
  static void put(Vector values, Unit* to) { store(to, values); }
  static void spell(Unit unit, float* to) { *to = unit; }
};

struct BFloat16 {
  using Unit = uint32_t;  // two neighbours, the first in the low half
  static constexpr int kDepth = 2;

  static Vector add(Vector sum, Unit row, const Unit* columns) {
#if defined(__AVX512BF16__)
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(row)),
                                    (__m512bh)_mm512_loadu_si512(columns));
#else
    const Words pair = Words{} + row, both = load<Words>(columns);
    sum = sum + (Vector)(pair << 16) * (Vector)(both << 16);
    return sum + (Vector)(pair & 0xffff0000u) * (Vector)(both & 0xffff0000u);
#endif
  }
  static void put(Vector values, Unit* to) { store(to, narrow(round_to_bfloat16(values))); }
  static void spell(Unit unit, float* to) {
    const uint32_t numbers[kDepth] = {unit << 16, unit & 0xffff0000u};
    std::memcpy(to, numbers, sizeof(numbers));
  }
};

// Operands of a product. Strides are in units, or in numbers of the result.
template <typename T>
struct Product {
  const typename T::Unit* rows;
  int64_t row_stride;
  const typename T::Unit* panel;  // `panel_stride` from one step of the depth to the next, 32 columns wide
  int64_t panel_stride;
  int64_t depth;  // in units
  float* out;
  int64_t out_stride;
  // out += rows * panel, not out = rows * panel. The product is summed by itself first: a chain through all tiles of a
  // long context would lose three bits.
  bool adds = false;
};

template <typename T, int kRows>
inline void multiply_rows(const Product<T>& p) {
  Vector sums[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = Vector{};
  const typename T::Unit *rows = p.rows, *panel = p.panel;
  for (int64_t k = 0; k < p.depth; ++k, ++rows, panel += p.panel_stride) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const typename T::Unit value = rows[r * p.row_stride];
      sums[r][0] = T::add(sums[r][0], value, panel);
      sums[r][1] = T::add(sums[r][1], value, panel + kLanes);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    for (int half = 0; half < 2; ++half) {
      float* out = p.out + r * p.out_stride + half * kLanes;
      store(out, p.adds ? load<Vector>(out) + sums[r][half] : sums[r][half]);
    }
  }
}

template <typename T, int kRows = kMaxRows>
inline void multiply_few(const Product<T>& p, int64_t num_rows) {
  if (num_rows == kRows) return multiply_rows<T, kRows>(p);
  if constexpr (kRows > 1) multiply_few<T, kRows - 1>(p, num_rows);
}

// Any number of rows, in groups as equal as can be.
template <typename T>
[[gnu::noinline]] void multiply(Product<T> p, int64_t num_rows) {
  for (int64_t groups = (num_rows + kMaxRows - 1) / kMaxRows; groups > 0; --groups) {
    const int64_t group = (num_rows + groups - 1) / groups;
    multiply_few<T>(p, group);
    p.rows += group * p.row_stride;
    p.out += group * p.out_stride;
    num_rows -= group;
  }
}

}  // namespace jaxserve
