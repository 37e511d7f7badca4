// The entry points that XLA calls: arguments decoded and checked, then the kernels.
#include "../linear/kernel_cpu.h"
#include "../ragged_paged_attention/kernel_cpu.h"

namespace jaxserve {

namespace ffi = xla::ffi;

using IntBuffer = ffi::Buffer<ffi::DataType::S32>;
using Output = ffi::Result<ffi::AnyBuffer>;

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

ffi::Error call_linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight, IntBuffer num_tokens, Output y) {
  const auto run = x.element_type() == ffi::DataType::F32 ? run_linear<Float32> : run_linear<BFloat16>;
  return run(pool, x, weight, num_tokens, y, false);
}

ffi::Error call_gated_linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight, IntBuffer num_tokens,
                             Output y) {
  const auto run = x.element_type() == ffi::DataType::F32 ? run_linear<Float32> : run_linear<BFloat16>;
  return run(pool, x, weight, num_tokens, y, true);
}

template <typename T>
ffi::Error run_attention(ffi::ThreadPool& pool, ffi::AnyBuffer q, ffi::AnyBuffer cache, IntBuffer tables,
                         IntBuffer seq_lens, IntBuffer cu_q_lens, IntBuffer num_seqs,
                         ffi::Buffer<ffi::DataType::F32> sinks, double scale, double softcap, int64_t window,
                         Output out) {
  using Unit = typename T::Unit;
  const auto sizes = q.dimensions(), pool_sizes = cache.dimensions();
  attend<T>(pool, {
      .q = static_cast<const Unit*>(q.untyped_data()),
      .cache = static_cast<const Unit*>(cache.untyped_data()),
      .tables = tables.typed_data(),
      .seq_lens = seq_lens.typed_data(),
      .cu_q_lens = cu_q_lens.typed_data(),
      .sinks = sinks.element_count() == 0 ? nullptr : sinks.typed_data(),
      .out = static_cast<Unit*>(out->untyped_data()),
      .num_tokens = sizes[0],
      .num_heads = sizes[1],
      .head_dim = sizes[2],
      .num_blocks = pool_sizes[0],
      .block_size = pool_sizes[1],
      .num_kv_heads = pool_sizes[2],
      .num_seqs = std::clamp<int64_t>(num_seqs.typed_data()[0], 0, seq_lens.element_count()),
      .table_width = tables.dimensions()[1],
      .scale = static_cast<float>(scale),
      .softcap = static_cast<float>(softcap),
      .window = window,
  });
  return ffi::Error::Success();
}

ffi::Error call_attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer cache, IntBuffer tables,
                          IntBuffer seq_lens, IntBuffer cu_q_lens, IntBuffer num_seqs,
                          ffi::Buffer<ffi::DataType::F32> sinks, double scale, double softcap, int64_t window,
                          Output out) {
  const auto run = q.element_type() == ffi::DataType::F32 ? run_attention<Float32> : run_attention<BFloat16>;
  return run(pool, q, cache, tables, seq_lens, cu_q_lens, num_seqs, sinks, scale, softcap, window, out);
}

}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_linear, jaxserve::call_linear,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<jaxserve::IntBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_gated_linear, jaxserve::call_gated_linear,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<jaxserve::IntBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_attention, jaxserve::call_attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<jaxserve::IntBuffer>()
                                  .Arg<jaxserve::IntBuffer>()
                                  .Arg<jaxserve::IntBuffer>()
                                  .Arg<jaxserve::IntBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Attr<double>("scale")
                                  .Attr<double>("softcap")
                                  .Attr<int64_t>("window")
                                  .Ret<xla::ffi::AnyBuffer>());
