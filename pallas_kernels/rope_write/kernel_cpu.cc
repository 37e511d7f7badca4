// From a layer's one product to what attention reads: bias, norm of heads, rotation; queries scaled and rounded, keys and
// values rounded and put into their blocks.
#include "../native/rows.h"

namespace jaxserve {

constexpr int64_t kRopeTask = 1 << 13;  // numbers: less is not worth another thread's waking

// What the handler decodes.
struct Heads {
  const float* qkv;         // [T, K, G + 2, H]
  const float *cos, *sin;   // [T, H / 2]
  const int32_t* slots;     // [T]; outside of the cache nothing is written
  std::vector<float> bias, q_norm, k_norm;  // [K, G + 2, H], [H], [H], or none of them
  int64_t num_kv_heads, num_groups, head_dim, num_slots;
  float eps, scale;

  // A head's numbers of a token, with their bias. `part` is the group, or G for the key and G + 1 for the value.
  void read(int64_t token, int64_t kv_head, int64_t part, float* row) const {
    const int64_t place = (kv_head * (num_groups + 2) + part) * head_dim;
    read_row(qkv + token * num_kv_heads * (num_groups + 2) * head_dim + place, head_dim, row);
    if (!bias.empty()) add_row(bias.data() + place, head_dim, row);
  }

  // The head normalised if need be, then each pair (i, i + H / 2) rotated, and scaled.
  template <typename Out>
  void turn(int64_t token, const std::vector<float>& norm, float factor, float* row, Out* to) const {
    if (!norm.empty()) normalise(row, norm.data(), head_dim, eps);
    const int64_t half = head_dim / 2;
    for (int64_t i = 0; i < half; i += kLanes) {
      const int64_t num = half - i;
      const Vector c = jaxserve::read(cos + token * half + i, num), s = jaxserve::read(sin + token * half + i, num);
      const Vector low = load_some<Vector>(row + i, num), high = load_some<Vector>(row + half + i, num);
      write((low * c - high * s) * spread(factor), num, to + i);
      write((high * c + low * s) * spread(factor), num, to + half + i);
    }
  }
};

template <typename Out>
void rope_write(const Pool& pool, const Heads& heads, int64_t num_tokens, Out* q, Out* cache) {
  const int64_t groups = heads.num_groups, head_dim = heads.head_dim;
  const int64_t tokens_each = std::max<int64_t>(kRopeTask / (heads.num_kv_heads * (groups + 2) * head_dim), 1);
  parallel_for(pool, (num_tokens + tokens_each - 1) / tokens_each, [&](int64_t task) {
    thread_local std::vector<float> memory;
    memory.resize(padded(head_dim));
    float* row = memory.data();
    for (int64_t token = task * tokens_each; token < std::min((task + 1) * tokens_each, num_tokens); ++token) {
      const int64_t slot = heads.slots[token];
      for (int64_t head = 0; head < heads.num_kv_heads; ++head) {
        for (int64_t group = 0; group < groups; ++group) {
          heads.read(token, head, group, row);
          heads.turn(token, heads.q_norm, heads.scale, row,
                     q + ((token * heads.num_kv_heads + head) * groups + group) * head_dim);
        }
        if (slot < 0 || slot >= heads.num_slots) continue;
        Out* to = cache + (slot * heads.num_kv_heads + head) * 2 * head_dim;
        heads.read(token, head, groups, row);
        heads.turn(token, heads.k_norm, 1.0f, row, to);
        heads.read(token, head, groups + 1, row);
        write_row(row, head_dim, to + head_dim);
      }
    }
  });
}

const char* run_rope_write(const Call& call) {
  const Array qkv = call.argument(0), cache = call.argument(8);
  if (qkv.rank() != 4 || cache.rank() != 4 || cache.size(2) != qkv.size(1) || cache.size(3) != 2 * qkv.size(3)) {
    return "the product is [T, K, G + 2, H] and the cache is [P, C, K, 2H]";
  }
  if (cache.buffer.data != call.result(1).buffer.data) return "the cache is not written in place";
  const Heads heads{
      qkv.data<float>(), call.argument(1).data<float>(), call.argument(2).data<float>(),
      call.argument(3).data<int32_t>(), as_floats(call.argument(4)), as_floats(call.argument(5)),
      as_floats(call.argument(6)), qkv.size(1), qkv.size(2) - 2, qkv.size(3), cache.size(0) * cache.size(1),
      static_cast<float>(call.attribute<double>("eps")), static_cast<float>(call.attribute<double>("scale")),
  };
  const int64_t num_tokens = std::clamp<int64_t>(call.argument(7).data<int32_t>()[0], 0, qkv.size(0));
  auto run = [&](auto* q, auto* to) { rope_write(call.pool(), heads, num_tokens, q, to); };
  const Array q = call.result(0);
  cache.is_float32() ? run(q.data<float>(), cache.data<float>()) : run(q.data<uint16_t>(), cache.data<uint16_t>());
  return nullptr;
}

}  // namespace jaxserve

extern "C" XLA_FFI_Error* jaxserve_rope_write(XLA_FFI_CallFrame* frame) {
  return jaxserve::handle(frame, "fffiaaaia", "aa", jaxserve::run_rope_write);
}
