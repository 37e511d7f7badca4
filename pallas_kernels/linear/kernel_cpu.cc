// y = x @ weight.T over weights that lie in panels: [panels, depth, 32 columns] of units (product.h).
#include "../native/product.h"
#include "../native/xla.h"

namespace jaxserve {

constexpr int64_t kTaskBytes = 1 << 20;  // of weights: more at once would leave a thread without work at the end
constexpr int64_t kTaskRows = 384;       // of which each reads its weights again: they are in the cache then

// Runs run(panel, first row, number of rows) for every panel and row, in pieces that go to the pool's threads.
template <typename Run>
void for_panels(const Pool& pool, int64_t num_panels, int64_t panel_bytes, int64_t num_rows, const Run& run) {
  const int64_t most = std::max<int64_t>(kTaskBytes / panel_bytes, 1);
  const int64_t panels = std::clamp<int64_t>(num_panels / (4 * pool.num_threads()), 1, most);
  const int64_t row_parts = (num_rows + kTaskRows - 1) / kTaskRows;
  const int64_t column_parts = (num_panels + panels - 1) / panels;
  parallel_for(pool, row_parts * column_parts, [&](int64_t task) {
    const int64_t part = task / column_parts, begin = task % column_parts * panels;
    const int64_t row = num_rows * part / row_parts, rows = num_rows * (part + 1) / row_parts - row;
    for (int64_t panel = begin; panel < std::min(begin + panels, num_panels); ++panel) run(panel, row, rows);
  });
}

// The first `num_rows` rows of y [.., num_columns].
template <typename T>
void linear(const Pool& pool, const typename T::Unit* x, const typename T::Unit* weight, int64_t num_rows,
            int64_t depth, int64_t num_columns, float* y) {
  const int64_t num_panels = (num_columns + kWidth - 1) / kWidth, panel_size = depth * kWidth;
  const int64_t panel_bytes = panel_size * sizeof(typename T::Unit);
  for_panels(pool, num_panels, panel_bytes, num_rows, [&](int64_t panel, int64_t row, int64_t rows) {
    const int64_t column = panel * kWidth;
    const Product<T> product{x + row * depth, depth, weight + panel * panel_size, kWidth, depth,
                             y + row * num_columns + column, num_columns};
    if (column + kWidth <= num_columns) return multiply<T>(product, rows);
    for (int64_t r = 0; r < rows; ++r) {  // the last panel is padded, what it gives is not
      float whole[kWidth];
      multiply<T>({product.rows + r * depth, depth, product.panel, kWidth, depth, whole, kWidth}, 1);
      std::memcpy(product.out + r * num_columns, whole, sizeof(float) * (num_columns - column));
    }
  });
}

inline Vector silu(Vector x) { return x / (1.0f + exp(-x)); }

// The first `num_rows` rows of silu(x @ gate.T) * (x @ up.T), rounded to x's type: the weight's first half of panels is
// the gate's, its second one that of up. What is twice as wide is never written to memory.
template <typename T>
void gated_linear(const Pool& pool, const typename T::Unit* x, const typename T::Unit* weight,
                  int64_t num_rows, int64_t depth, int64_t num_columns, typename T::Unit* y) {
  const int64_t num_panels = num_columns / kWidth, panel_size = depth * kWidth;
  const int64_t panel_bytes = 2 * panel_size * sizeof(typename T::Unit);
  for_panels(pool, num_panels, panel_bytes, num_rows, [&](int64_t panel, int64_t row, int64_t rows) {
    const auto *gate_panel = weight + panel * panel_size, *up_panel = gate_panel + num_panels * panel_size;
    for (int64_t first = row; first < row + rows; first += kMaxRows) {
      const int64_t some = std::min<int64_t>(kMaxRows, row + rows - first);
      float gate[kMaxRows * kWidth], up[kMaxRows * kWidth];
      multiply<T>({x + first * depth, depth, gate_panel, kWidth, depth, gate, kWidth}, some);
      multiply<T>({x + first * depth, depth, up_panel, kWidth, depth, up, kWidth}, some);
      for (int64_t r = 0; r < some; ++r) {
        for (int64_t i = r * kWidth; i < (r + 1) * kWidth; i += kLanes) {
          const Vector value = silu(load<Vector>(gate + i)) * load<Vector>(up + i);
          T::put(value, y + ((first + r) * num_columns + panel * kWidth + i - r * kWidth) / T::kDepth);
        }
      }
    }
  });
}

// Row `id` of a matrix in panels, as float32.
template <typename T>
void take_row(const typename T::Unit* panels, int64_t depth, int64_t id, float* to) {
  const typename T::Unit* from = panels + id / kWidth * depth * kWidth + id % kWidth;
  for (int64_t unit = 0; unit < depth; ++unit) T::spell(from[unit * kWidth], to + unit * T::kDepth);
}

// What XLA calls: arguments decoded and checked.

bool are_panels(Array weight, int64_t num_panels, int64_t depth) {
  return weight.rank() == 4 && weight.size(0) == num_panels && weight.size(1) == depth && weight.size(2) == kWidth;
}

// Rows of a step that hold a token: the first so many. The others are nobody's, and nothing is written to them.
int64_t fed_rows(Array x, Array num_tokens) {
  return std::clamp<int64_t>(num_tokens.data<int32_t>()[0], 0, x.size(0));
}

template <typename T>
const char* run_linear(const Call& call, bool is_gated) {
  using Unit = typename T::Unit;
  const Array x = call.argument(0), weight = call.argument(1), y = call.result(0);
  const int64_t depth = x.size(1) / T::kDepth, columns = y.size(1);
  const int64_t panels = is_gated ? 2 * (columns / kWidth) : (columns + kWidth - 1) / kWidth;
  if (!are_panels(weight, panels, depth) || (is_gated && columns % kWidth != 0)) {
    return "weights are not in the panels of these outputs and inputs";
  }
  const int64_t rows = fed_rows(x, call.argument(2));
  const auto *from = x.data<const Unit>(), *by = weight.data<const Unit>();
  if (is_gated) {
    gated_linear<T>(call.pool(), from, by, rows, depth, columns, y.data<Unit>());
  } else {
    linear<T>(call.pool(), from, by, rows, depth, columns, y.data<float>());
  }
  return nullptr;
}

template <typename T>
const char* run_take_rows(const Call& call) {
  const Array weight = call.argument(0), ids = call.argument(1), y = call.result(0);
  const int64_t depth = y.size(1) / T::kDepth, last = weight.size(0) * kWidth - 1;
  if (!are_panels(weight, weight.size(0), depth)) return "the matrix is not in the panels of these columns";
  for (int64_t t = 0; t < fed_rows(y, call.argument(2)); ++t) {
    const int64_t id = std::clamp<int64_t>(ids.data<int32_t>()[t], 0, last);
    take_row<T>(weight.data<const typename T::Unit>(), depth, id, y.data<float>() + t * y.size(1));
  }
  return nullptr;
}

XLA_FFI_Error* handle_linear(XLA_FFI_CallFrame* frame, bool is_gated) {
  return handle(frame, "aai", "a", [=](const Call& call) {
    return call.argument(0).is_float32() ? run_linear<Float32>(call, is_gated) : run_linear<BFloat16>(call, is_gated);
  });
}

}  // namespace jaxserve

extern "C" XLA_FFI_Error* jaxserve_linear(XLA_FFI_CallFrame* frame) { return jaxserve::handle_linear(frame, false); }

extern "C" XLA_FFI_Error* jaxserve_gated_linear(XLA_FFI_CallFrame* frame) {
  return jaxserve::handle_linear(frame, true);
}

extern "C" XLA_FFI_Error* jaxserve_take_rows(XLA_FFI_CallFrame* frame) {
  return jaxserve::handle(frame, "aii", "f", [](const jaxserve::Call& call) {
    return call.argument(0).is_float32() ? jaxserve::run_take_rows<jaxserve::Float32>(call)
                                         : jaxserve::run_take_rows<jaxserve::BFloat16>(call);
  });
}
