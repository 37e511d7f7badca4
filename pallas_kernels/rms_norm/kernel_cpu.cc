// The residual stream between two products: what the last one gave is added, and the sum normalised for the next one.
#include "../native/rows.h"

namespace jaxserve {

constexpr int64_t kNormTask = 1 << 14;  // numbers: less is not worth another thread's waking

template <typename Out>
void add_rms_norm(const Pool& pool, const float* x, const float* delta, const std::vector<float>& weight, float eps,
                  int64_t num_rows, int64_t num, float* total, Out* out) {
  const int64_t rows_each = std::max<int64_t>(kNormTask / num, 1);
  parallel_for(pool, (num_rows + rows_each - 1) / rows_each, [&](int64_t task) {
    thread_local std::vector<float> memory;
    memory.resize(padded(num));
    float* row = memory.data();
    for (int64_t r = task * rows_each; r < std::min((task + 1) * rows_each, num_rows); ++r) {
      read_row(x + r * num, num, row);
      if (delta != nullptr) add_row(delta + r * num, num, row);
      write_row(row, num, total + r * num);
      normalise(row, weight.data(), num, eps);
      write_row(row, num, out + r * num);
    }
  });
}

const char* run_add_rms_norm(const Call& call) {
  const Array x = call.argument(0), delta = call.argument(1), weight = call.argument(2), out = call.result(1);
  if (x.rank() != 2 || (delta.count() != 0 && delta.count() != x.count()) || weight.count() != x.size(1)) {
    return "x is [T, D], delta is that or empty, and the weight is [D]";
  }
  const int64_t num = x.size(1), num_rows = std::clamp<int64_t>(call.argument(3).data<int32_t>()[0], 0, x.size(0));
  const float eps = static_cast<float>(call.attribute<double>("eps"));
  const std::vector<float> weights = as_floats(weight);
  const float* added = delta.count() == 0 ? nullptr : delta.data<float>();
  auto run = [&](auto* to) {
    add_rms_norm(call.pool(), x.data<float>(), added, weights, eps, num_rows, num, call.result(0).data<float>(), to);
  };
  out.is_float32() ? run(out.data<float>()) : run(out.data<uint16_t>());
  return nullptr;
}

}  // namespace jaxserve

extern "C" XLA_FFI_Error* jaxserve_add_rms_norm(XLA_FFI_CallFrame* frame) {
  return jaxserve::handle(frame, "ffai", "fa", jaxserve::run_add_rms_norm);
}
