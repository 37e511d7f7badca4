// Attention of a ragged stream over paged keys and values on a CPU: FlashAttention's online softmax over tiles of 64 keys
// that begin at position 0.
//
// A task is a few neighbouring queries of a sequence, or its one query with all heads. For each tile and kv head it turns
// the keys once, so that a product's columns are keys, and then takes two products (product.h): scores, and weighted
// values.
// A query's bits depend on its own sequence alone: each number is one chain over the depth, each sum over a tile's keys
// has one order, and how many queries go together changes neither.
#include <limits>
#include <vector>

#include "../native/product.h"
#include "../native/xla.h"

namespace jaxserve {

constexpr int kTile = 64;           // keys
constexpr int kTaskQueries = 192;   // queries times heads of a task: what it writes between products fits a core's L2
constexpr int kTaskTokens = 64;
constexpr int kFewQueries = 4;      // tokens of a task that takes all kv heads, whose keys lie side by side in memory
constexpr int kMaxHeadDim = 512;
constexpr float kFloor = -1e30f;    // the running maximum before any key: finite, so that -inf - kFloor is no NaN

// What the handler decodes. Rows of a block table past a sequence's end may be anything.
template <typename T>
struct Attention {
  using Unit = typename T::Unit;

  const Unit* q;      // [T, N, H]
  const Unit* cache;  // [P, C, K, 2H]
  const int32_t *tables, *seq_lens, *cu_q_lens;
  const float* sinks;  // [N] or null
  Unit* out;           // [T, N, H]
  int64_t num_tokens, num_heads, head_dim;
  int64_t num_blocks, block_size, num_kv_heads;
  int64_t num_seqs, table_width;
  float scale, softcap;  // softcap 0: none
  int64_t window;        // 0: none

  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t units() const { return head_dim / T::kDepth; }                   // of a head
  int64_t width() const { return (head_dim + kWidth - 1) / kWidth * kWidth; }  // of a head in panels

  int64_t token_units() const { return num_kv_heads * 2 * units(); }  // of a token in the cache

  // Where `count` positions from `first` on lie in the cache.
  void find_tokens(int64_t sequence, int64_t first, int64_t count, const Unit** tokens) const {
    const int64_t token = token_units();
    int64_t column = first / block_size, offset = first % block_size;
    while (count > 0) {
      const int64_t block = std::clamp<int64_t>(tables[sequence * table_width + column], 0, num_blocks - 1);
      const Unit* from = cache + (block * block_size + offset) * token;
      const int64_t num = std::min(block_size - offset, count);
      for (int64_t i = 0; i < num; ++i) *tokens++ = from + i * token;
      count -= num, ++column, offset = 0;
    }
  }
};

struct Task {
  int32_t sequence, first_head, num_heads;  // kv heads
  int32_t first, count;                     // tokens of the stream
};

// A thread's memory between two products, kept from task to task.
template <typename T>
struct Scratch {
  std::vector<typename T::Unit> queries, keys, weights, values;
  std::vector<float> scores, weighted, highest, total;

  void resize(int64_t rows, int64_t units, int64_t width) {
    queries.resize(rows * units);
    keys.resize(units * kTile);
    weights.resize(rows * (kTile / T::kDepth));
    values.resize(kTile / T::kDepth * width);
    scores.resize(rows * kTile);
    weighted.resize(rows * width);
    highest.resize(rows);
    total.resize(rows);
  }
};

// keys[panel][unit][32]: unit u of 64 keys side by side, those at `offset` of their tokens; zeros from `count` on, where
// nothing is written.
template <typename Unit>
void turn_keys(const Unit* const* tokens, int64_t offset, int64_t count, int64_t units, Unit* keys) {
  for (int64_t start = 0; start < kTile; start += kLanes) {
    const Unit* from[kLanes];
    const int64_t some = std::clamp<int64_t>(count - start, 0, kLanes);
    for (int64_t i = 0; i < some; ++i) from[i] = tokens[start + i] + offset;
    Unit* to = keys + start / kWidth * units * kWidth + start % kWidth;
    int64_t unit = 0;
    for (; unit + kLanes <= units; unit += kLanes) {
      Words rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) rows[i] = i < some ? load<Words>(from[i] + unit) : Words{};
      transpose(rows);
      for (int64_t i = 0; i < kLanes; ++i) store(to + (unit + i) * kWidth, rows[i]);
    }
    for (; unit < units; ++unit) {
      for (int64_t i = 0; i < kLanes; ++i) to[unit * kWidth + i] = i < some ? from[i][unit] : Unit{};
    }
  }
}

// values[key unit][width], as they lie at `offset` of their tokens; a unit is one key's number, or two neighbouring keys'
// of bfloat16.
inline void lay_values(const float* const* tokens, int64_t offset, int64_t count, int64_t head_dim, int64_t width,
                       float* values) {
  for (int64_t key = 0; key < kTile; ++key, values += width) {
    if (key < count) {
      std::memcpy(values, tokens[key] + offset, sizeof(float) * head_dim);
    } else {
      std::fill(values, values + head_dim, 0.0f);
    }
  }
}

inline void lay_values(const uint32_t* const* tokens, int64_t offset, int64_t count, int64_t head_dim, int64_t width,
                       uint32_t* values) {
  static constexpr uint32_t kZeros[kMaxHeadDim / 2] = {};
  auto value = [&](int64_t key) {
    return reinterpret_cast<const uint16_t*>(key < count ? tokens[key] + offset : kZeros);
  };
  for (int64_t key = 0; key < kTile; key += 2, values += width) {
    const uint16_t *low = value(key), *high = value(key + 1);
    int64_t i = 0;
    for (; i + kLanes <= head_dim; i += kLanes) {
      store(values + i, widen(load<Halves>(low + i)) | widen(load<Halves>(high + i)) << 16);
    }
    for (; i < head_dim; ++i) values[i] = low[i] | static_cast<uint32_t>(high[i]) << 16;
  }
}

inline void put_out(const float* from, float factor, int64_t num, float* to) {
  for (int64_t i = 0; i < num; ++i) to[i] = from[i] * factor;
}

inline void put_out(const float* from, float factor, int64_t num, uint32_t* to) {
  auto* halves = reinterpret_cast<uint16_t*>(to);
  int64_t i = 0;
  for (; i + kLanes <= num; i += kLanes) {
    store(halves + i, narrow(round_to_bfloat16(load<Vector>(from + i) * spread(factor))));
  }
  for (; i < num; ++i) halves[i] = static_cast<uint16_t>(round_to_bfloat16(spread(from[i] * factor))[0]);
}

// One row of a tile: from scores to weights, with what the row has summed so far brought to the new maximum.
template <typename T>
void fold_row(const Attention<T>& a, const float* scores, int64_t position, int64_t first, Scratch<T>& s, int64_t row,
              int64_t weights_row) {
  constexpr int kVectors = kTile / kLanes;
  constexpr Ints kPlaces = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const bool is_masked = first + kTile > position + 1 || (a.window != 0 && first <= position - a.window);
  const int64_t oldest = a.window == 0 ? 0 : position - a.window + 1;
  Vector p[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    p[i] = load<Vector>(scores + i * kLanes) * spread(a.scale);
    if (a.softcap != 0) p[i] = spread(a.softcap) * tanh(p[i] / spread(a.softcap));
    if (is_masked) {
      const Ints place = kPlaces + static_cast<int32_t>(first + i * kLanes);
      const Ints seen = (place <= static_cast<int32_t>(position)) & (place >= static_cast<int32_t>(oldest));
      p[i] = seen ? p[i] : spread(-std::numeric_limits<float>::infinity());
    }
  }
  const float highest = std::max(s.highest[row], largest(larger(larger(p[0], p[1]), larger(p[2], p[3]))));
  for (int i = 0; i < kVectors; ++i) p[i] = exp(p[i] - spread(highest));
  const float total = sum((p[0] + p[1]) + (p[2] + p[3]));
  if (highest != s.highest[row]) {  // else the factor is 1
    const float shrink = exp(spread(s.highest[row] - highest))[0];
    float* weighted = s.weighted.data() + row * a.width();
    for (int64_t i = 0; i < a.width(); i += kLanes) store(weighted + i, load<Vector>(weighted + i) * spread(shrink));
    s.total[row] *= shrink;
    s.highest[row] = highest;
  }
  s.total[row] += total;
  typename T::Unit* weights = s.weights.data() + weights_row * (kTile / T::kDepth);
  for (int i = 0; i < kVectors; ++i) T::put(p[i], weights + i * (kLanes / T::kDepth));
}

// Takes one tile of a kv head's keys into `rows` rows, `group` of which are one query's. `part` is the head's place in
// the scratch.
template <typename T>
void fold_tile(const Attention<T>& a, const typename T::Unit* const* tokens, int64_t kv_head, int64_t first,
               int64_t count, int64_t position, int64_t part, int64_t rows, Scratch<T>& s) {
  const int64_t units = a.units(), width = a.width(), offset = kv_head * 2 * units;
  turn_keys(tokens, offset, count, units, s.keys.data());
  lay_values(tokens, offset + units, count, a.head_dim, width, s.values.data());
  for (int64_t half = 0; half < kTile; half += kWidth) {
    multiply<T>({s.queries.data() + part * rows * units, units, s.keys.data() + half * units, kWidth, units,
                        s.scores.data() + half, kTile}, rows);
  }
  for (int64_t row = 0; row < rows; ++row) {
    fold_row(a, s.scores.data() + row * kTile, position + row / a.group(), first, s, part * rows + row, row);
  }
  for (int64_t column = 0; column < width; column += kWidth) {
    multiply<T>({s.weights.data(), kTile / T::kDepth, s.values.data() + column, width, kTile / T::kDepth,
                       s.weighted.data() + part * rows * width + column, width, true}, rows);
  }
}

template <typename T>
void run_task(const Attention<T>& a, const Task& task, Scratch<T>& s) {
  using Unit = typename T::Unit;
  const int64_t group = a.group(), units = a.units(), width = a.width(), rows = task.count * group;
  const int64_t num_rows = task.num_heads * rows;  // by kv head, by token, by query head
  const int64_t position = a.seq_lens[task.sequence] - (a.cu_q_lens[task.sequence + 1] - task.first);  // of the first
  auto stream_row = [&](int64_t row) {
    const int64_t head = task.first_head + row / rows, token = task.first + row % rows / group;
    return (token * a.num_heads + head * group + row % group) * units;
  };
  s.resize(num_rows, units, width);
  for (int64_t row = 0; row < num_rows; ++row) {
    std::memcpy(s.queries.data() + row * units, a.q + stream_row(row), sizeof(Unit) * units);
    const int64_t head = (task.first_head + row / rows) * group + row % group;
    s.highest[row] = a.sinks == nullptr ? kFloor : a.sinks[head];
    s.total[row] = a.sinks == nullptr ? 0.0f : 1.0f;
  }
  std::fill(s.weighted.begin(), s.weighted.end(), 0.0f);

  const int64_t num_keys = position + task.count;
  const int64_t oldest = a.window == 0 ? 0 : std::max<int64_t>(position - a.window + 1, 0);
  const Unit *tokens[kTile] = {}, *next[kTile] = {};
  auto ask_for = [&](int64_t first) {  // so that it is under way while another tile is worked on
    const int64_t count = std::clamp<int64_t>(num_keys - first, 0, kTile);
    a.find_tokens(task.sequence, first, count, next);
    const int64_t begin = task.first_head * 2 * units, end = begin + task.num_heads * 2 * units;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t unit = begin; unit < end; unit += 64 / sizeof(Unit)) __builtin_prefetch(next[i] + unit, 0, 2);
    }
  };
  ask_for(oldest / kTile * kTile);
  for (int64_t first = oldest / kTile * kTile; first < num_keys; first += kTile) {
    const int64_t count = std::min<int64_t>(kTile, num_keys - first);
    std::copy(next, next + kTile, tokens);
    ask_for(first + kTile);
    for (int64_t head = 0; head < task.num_heads; ++head) {
      fold_tile(a, tokens, task.first_head + head, first, count, position, head, rows, s);
    }
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    const float total = s.total[row];  // 0 where no key was seen; NaN stays what it is
    put_out(s.weighted.data() + row * width, total == 0 ? 0.0f : 1.0f / total, a.head_dim, a.out + stream_row(row));
  }
}

// The tasks of a stream, those of a chunk's longest contexts first.
template <typename T>
std::vector<Task> attention_tasks(const Attention<T>& a, int64_t num_threads) {
  std::vector<Task> tasks;
  const int64_t most = std::clamp<int64_t>(kTaskQueries / a.group(), 1, kTaskTokens);
  const bool are_many = a.num_seqs >= 4 * num_threads;  // enough for all threads without cutting them by head
  for (int64_t sequence = 0; sequence < a.num_seqs; ++sequence) {
    const int64_t begin = a.cu_q_lens[sequence], end = a.cu_q_lens[sequence + 1];
    const bool fits = 0 <= begin && begin <= end && end <= a.num_tokens && end - begin <= a.seq_lens[sequence] &&
                      a.seq_lens[sequence] <= a.table_width * a.block_size;
    if (!fits) continue;  // no such sequence: nothing is read past what there is
    const int64_t parts = (end - begin + most - 1) / most;
    const int64_t heads = are_many && end - begin <= kFewQueries ? a.num_kv_heads : 1;
    for (int64_t part = parts - 1; part >= 0; --part) {
      const int64_t first = begin + part * most, count = std::min(most, end - first);
      for (int64_t head = 0; head < a.num_kv_heads; head += heads) {
        tasks.push_back({static_cast<int32_t>(sequence), static_cast<int32_t>(head), static_cast<int32_t>(heads),
                         static_cast<int32_t>(first), static_cast<int32_t>(count)});
      }
    }
  }
  return tasks;
}

template <typename T>
void attend(const Pool& pool, const Attention<T>& a) {
  const std::vector<Task> tasks = attention_tasks(a, pool.num_threads());
  const int64_t fed = std::clamp<int64_t>(a.cu_q_lens[a.num_seqs], 0, a.num_tokens);
  std::memset(a.out, 0, sizeof(typename T::Unit) * fed * a.num_heads * a.units());  // of who has no task
  parallel_for(pool, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    thread_local Scratch<T> scratch;
    run_task(a, tasks[i], scratch);
  });
}

// What XLA calls: arguments decoded.

template <typename T>
const char* run_attention(const Call& call) {
  using Unit = typename T::Unit;
  const Array q = call.argument(0), cache = call.argument(1), tables = call.argument(2), seq_lens = call.argument(3);
  const Array cu_q_lens = call.argument(4), num_seqs = call.argument(5), sinks = call.argument(6);
  if (q.rank() != 3 || cache.rank() != 4) return "queries are [T, N, H] and the cache is [P, C, K, 2H]";
  attend<T>(call.pool(), {
      .q = q.data<const Unit>(),
      .cache = cache.data<const Unit>(),
      .tables = tables.data<int32_t>(),
      .seq_lens = seq_lens.data<int32_t>(),
      .cu_q_lens = cu_q_lens.data<int32_t>(),
      .sinks = sinks.count() == 0 ? nullptr : sinks.data<float>(),
      .out = call.result(0).data<Unit>(),
      .num_tokens = q.size(0),
      .num_heads = q.size(1),
      .head_dim = q.size(2),
      .num_blocks = cache.size(0),
      .block_size = cache.size(1),
      .num_kv_heads = cache.size(2),
      .num_seqs = std::clamp<int64_t>(num_seqs.data<int32_t>()[0], 0, seq_lens.count()),
      .table_width = tables.size(1),
      .scale = static_cast<float>(call.attribute<double>("scale")),
      .softcap = static_cast<float>(call.attribute<double>("softcap")),
      .window = call.attribute<int64_t>("window"),
  });
  return nullptr;
}

}  // namespace jaxserve

extern "C" XLA_FFI_Error* jaxserve_attention(XLA_FFI_CallFrame* frame) {
  return jaxserve::handle(frame, "aaiiiif", "a", [](const jaxserve::Call& call) {
    return call.argument(0).is_float32() ? jaxserve::run_attention<jaxserve::Float32>(call)
                                         : jaxserve::run_attention<jaxserve::BFloat16>(call);
  });
}
