// Rows of float32 numbers in a thread's own memory, as whole vectors: zeros follow the last number.
#pragma once

#include <cmath>
#include <vector>

#include "vector.h"
#include "xla.h"

namespace jaxserve {

inline int64_t padded(int64_t num) { return (num + kLanes - 1) / kLanes * kLanes; }

// As many of a vector's numbers as there are; zeros for the others.
template <typename V, typename T>
inline V load_some(const T* from, int64_t num) {
  if (num >= kLanes) return load<V>(from);
  V out{};
  std::memcpy(&out, from, sizeof(T) * num);
  return out;
}

template <typename V, typename T>
inline void store_some(T* to, V value, int64_t num) {
  if (num >= kLanes) return store(to, value);
  std::memcpy(to, &value, sizeof(T) * num);
}

inline Vector read(const float* from, int64_t num) { return load_some<Vector>(from, num); }
inline Vector read(const uint16_t* from, int64_t num) { return (Vector)(widen(load_some<Halves>(from, num)) << 16); }
inline void write(Vector v, int64_t num, float* to) { store_some(to, v, num); }
inline void write(Vector v, int64_t num, uint16_t* to) { store_some(to, narrow(round_to_bfloat16(v)), num); }

template <typename T>
inline void read_row(const T* from, int64_t num, float* row) {
  for (int64_t i = 0; i < num; i += kLanes) store(row + i, read(from + i, num - i));
}

// float32 as it is, or the nearest bfloat16.
template <typename T>
inline void write_row(const float* row, int64_t num, T* to) {
  for (int64_t i = 0; i < num; i += kLanes) write(load<Vector>(row + i), num - i, to + i);
}

inline void add_row(const float* other, int64_t num, float* row) {
  for (int64_t i = 0; i < num; i += kLanes) store(row + i, load<Vector>(row + i) + read(other + i, num - i));
}

// x / rms(x) * weight (Zhang & Sennrich, arXiv:1910.07467 §4). The sum has one order, which the length decides.
inline void normalise(float* row, const float* weight, int64_t num, float eps) {
  Vector squares{};
  for (int64_t i = 0; i < num; i += kLanes) squares = squares + load<Vector>(row + i) * load<Vector>(row + i);
  const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(num) + eps);
  for (int64_t i = 0; i < num; i += kLanes) store(row + i, load<Vector>(row + i) * scale * load<Vector>(weight + i));
}

// An array as float32, whole vectors of it.
inline std::vector<float> as_floats(Array array) {
  std::vector<float> out(padded(array.count()));
  if (array.is_float32()) read_row(array.data<float>(), array.count(), out.data());
  else read_row(array.data<uint16_t>(), array.count(), out.data());
  return out;
}

}  // namespace jaxserve
