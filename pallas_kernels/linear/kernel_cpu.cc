// y = x @ weight.T over weights that lie in panels: [panels, depth, 32 columns] of units (product.h).
#include "../native/product.h"
#include "../native/xla.h"

namespace jaxserve {

constexpr int64_t kTaskBytes = 1 << 20;  // of weights: more at once would leave a thread without work at the end
constexpr int64_t kTaskRows = 384;       // of which each reads its weights again: they are in the cache then

// Runs run(panel, first row, number of rows) for every panel and row, in pieces that go to the pool's threads.
template <typename Run>
void for_panels(ffi::ThreadPool& pool, int64_t num_panels, int64_t panel_bytes, int64_t num_rows, const Run& run) {
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
void linear(ffi::ThreadPool& pool, const typename T::Unit* x, const typename T::Unit* weight, int64_t num_rows,
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
void gated_linear(ffi::ThreadPool& pool, const typename T::Unit* x, const typename T::Unit* weight,
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

// What XLA calls: arguments decoded and checked.

bool are_panels(ffi::AnyBuffer weight, int64_t num_panels, int64_t depth) {
  const auto sizes = weight.dimensions();
  return sizes.size() == 4 && sizes[0] == num_panels && sizes[1] == depth && sizes[2] == kWidth;
}

// Rows of a step that hold a token; those past it become zeros.
int64_t fed_rows(ffi::AnyBuffer x, IntBuffer num_tokens, Output& y) {
  const int64_t all = x.dimensions()[0], fed = std::clamp<int64_t>(num_tokens.typed_data()[0], 0, all);
  const int64_t row_bytes = static_cast<int64_t>(y->size_bytes()) / all;
  std::memset(static_cast<char*>(y->untyped_data()) + fed * row_bytes, 0, (all - fed) * row_bytes);
  return fed;
}

template <typename T>
ffi::Error run_linear(ffi::ThreadPool& pool, ffi::AnyBuffer x, ffi::AnyBuffer weight, IntBuffer num_tokens, Output y,
                      bool is_gated) {
  using Unit = typename T::Unit;
  const int64_t depth = x.dimensions()[1] / T::kDepth, columns = y->dimensions()[1];
  const int64_t panels = is_gated ? 2 * (columns / kWidth) : (columns + kWidth - 1) / kWidth;
  if (!are_panels(weight, panels, depth) || (is_gated && columns % kWidth != 0)) {
    return ffi::Error::InvalidArgument("weights are not in the panels of these outputs and inputs");
  }
  const auto *from = static_cast<const Unit*>(x.untyped_data()), *by = static_cast<const Unit*>(weight.untyped_data());
  const int64_t rows = fed_rows(x, num_tokens, y);
  if (is_gated) {
    gated_linear<T>(pool, from, by, rows, depth, columns, static_cast<Unit*>(y->untyped_data()));
  } else {
    linear<T>(pool, from, by, rows, depth, columns, static_cast<float*>(y->untyped_data()));
  }
  return ffi::Error::Success();
}

template <bool kGated>
ffi::Error call(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight, IntBuffer num_tokens, Output y) {
  const auto run = x.element_type() == ffi::DataType::F32 ? run_linear<Float32> : run_linear<BFloat16>;
  return run(pool, x, weight, num_tokens, y, kGated);
}

}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_linear, jaxserve::call<false>,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<jaxserve::IntBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_gated_linear, jaxserve::call<true>,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<jaxserve::IntBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>());
