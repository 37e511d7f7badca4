// What kernels have of XLA: its names, and the threads of its own pool, one for each core of the process.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace jaxserve {

namespace ffi = xla::ffi;
using IntBuffer = ffi::Buffer<ffi::DataType::S32>;
using Output = ffi::Result<ffi::AnyBuffer>;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Runs run(i) for each i of [0, num), on this thread and on whichever of the pool's comes in time.
//
// Nobody waits for a thread of the pool to begin: it may be busy, or blocked itself. This one takes all that the others
// have not begun, and a thread that comes late finds nothing left and touches only what it holds a share of.
template <typename Run>
void parallel_for(ffi::ThreadPool& pool, int64_t num, const Run& run) {
  const int64_t num_helpers = std::min<int64_t>(pool.num_threads(), num) - 1;
  if (num_helpers < 1) {
    for (int64_t i = 0; i < num; ++i) run(i);
    return;
  }
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  auto work = [progress, num, &run] {
    for (int64_t i; (i = progress->next.fetch_add(1)) < num;) {
      run(i);
      progress->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 0; i < num_helpers; ++i) pool.Schedule([work] { work(); });
  work();
  for (int spins = 0; progress->done.load(std::memory_order_acquire) < num; ++spins) {
    if (spins < 1000) pause();
    else std::this_thread::yield();  // its thread may have lost its core
  }
}

}  // namespace jaxserve
