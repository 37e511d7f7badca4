// What kernels have of XLA: the arguments of a call, and the threads of its own pool, one for each core of the process.
//
// Through XLA's C interface: the C++ one on top of it takes a compiler longer than the kernels do.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <thread>

#include "xla/ffi/api/c_api.h"

namespace jaxserve {

// An argument or a result.
struct Array {
  const XLA_FFI_Buffer& buffer;

  template <typename T>
  T* data() const { return static_cast<T*>(buffer.data); }
  int64_t rank() const { return buffer.rank; }
  int64_t size(int64_t axis) const { return buffer.dims[axis]; }
  int64_t count() const {
    int64_t num = 1;
    for (int64_t axis = 0; axis < rank(); ++axis) num *= size(axis);
    return num;
  }
  bool is_float32() const { return buffer.dtype == XLA_FFI_DataType_F32; }
  bool is_bfloat16() const { return buffer.dtype == XLA_FFI_DataType_BF16 || buffer.dtype == XLA_FFI_DataType_U16; }
};

// The threads of a call.
struct Pool {
  const XLA_FFI_Api* api;
  XLA_FFI_ExecutionContext* context;

  int64_t num_threads() const {
    int64_t num = 1;
    XLA_FFI_ThreadPool_NumThreads_Args args{XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, nullptr, context, &num};
    forget(api->XLA_FFI_ThreadPool_NumThreads(&args));
    return num;
  }

  // Runs task(data) some time, on any thread.
  void schedule(XLA_FFI_Task* task, void* data) const {
    XLA_FFI_ThreadPool_Schedule_Args args{XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, nullptr, context, task, data};
    if (forget(api->XLA_FFI_ThreadPool_Schedule(&args))) task(data);
  }

 private:
  // Whether there was an error. What went wrong does not matter: this thread does all by itself then.
  bool forget(XLA_FFI_Error* error) const {
    if (error == nullptr) return false;
    XLA_FFI_Error_Destroy_Args args{XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, error};
    api->XLA_FFI_Error_Destroy(&args);
    return true;
  }
};

template <typename T> constexpr XLA_FFI_DataType kDataType = XLA_FFI_DataType_INVALID;
template <> constexpr XLA_FFI_DataType kDataType<double> = XLA_FFI_DataType_F64;
template <> constexpr XLA_FFI_DataType kDataType<int64_t> = XLA_FFI_DataType_S64;

struct Call {
  XLA_FFI_CallFrame* frame;
  mutable const char* wrong = nullptr;

  Array argument(int64_t i) const { return {*static_cast<XLA_FFI_Buffer*>(frame->args.args[i])}; }
  Array result(int64_t i) const { return {*static_cast<XLA_FFI_Buffer*>(frame->rets.rets[i])}; }
  Pool pool() const { return {frame->api, frame->ctx}; }

  // A static number by its name. Without one of this type the call is an error.
  template <typename T>
  T attribute(const char* name) const {
    for (int64_t i = 0; i < frame->attrs.size; ++i) {
      const XLA_FFI_ByteSpan& found = *frame->attrs.names[i];
      if (found.len != std::strlen(name) || std::memcmp(found.ptr, name, found.len) != 0) continue;
      if (frame->attrs.types[i] != XLA_FFI_AttrType_SCALAR) break;
      const auto* scalar = static_cast<const XLA_FFI_Scalar*>(frame->attrs.attrs[i]);
      if (scalar->dtype == kDataType<T>) return *static_cast<const T*>(scalar->value);
    }
    wrong = "an attribute is missing or of another type";
    return T{};
  }

  XLA_FFI_Error* error(const char* message) const {
    XLA_FFI_Error_Create_Args args{XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, message,
                                   XLA_FFI_Error_Code_INVALID_ARGUMENT};
    return frame->api->XLA_FFI_Error_Create(&args);
  }
};

// Whether buffers are as many as there are letters and of their types: i int32, f float32, a float32 or bfloat16.
inline bool have_types(void** buffers, int64_t num, const char* types) {
  if (num != static_cast<int64_t>(std::strlen(types))) return false;
  for (int64_t i = 0; i < num; ++i) {
    const Array array{*static_cast<XLA_FFI_Buffer*>(buffers[i])};
    const bool fits = types[i] == 'i' ? array.buffer.dtype == XLA_FFI_DataType_S32
                                      : array.is_float32() || (types[i] == 'a' && array.is_bfloat16());
    if (!fits) return false;
  }
  return true;
}

// What XLA calls: once to ask for the interface's version, then for each call. `run` returns what is wrong, or null.
// Arguments and results have the types of `have_types`.
template <typename Run>
XLA_FFI_Error* handle(XLA_FFI_CallFrame* frame, const char* arguments, const char* results, const Run& run) {
  if (frame->extension_start != nullptr && frame->extension_start->type == XLA_FFI_Extension_Metadata) {
    auto* metadata = reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start)->metadata;
    metadata->api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
    metadata->traits = 0;
    return nullptr;
  }
  const Call call{frame};
  if (frame->stage != XLA_FFI_ExecutionStage_EXECUTE) return call.error("kernels have nothing to prepare");
  if (!have_types(frame->args.args, frame->args.size, arguments) ||
      !have_types(frame->rets.rets, frame->rets.size, results)) {
    return call.error("the kernel has other arguments or results");
  }
  const char* wrong = run(call);
  if (wrong == nullptr) wrong = call.wrong;
  return wrong == nullptr ? nullptr : call.error(wrong);
}

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// What the threads of a `parallel_for` share.
struct Progress {
  const int64_t num;
  void (*const run)(const void*, int64_t);
  const void* const data;
  std::atomic<int64_t> next{0}, done{0};

  Progress(int64_t num, void (*run)(const void*, int64_t), const void* data) : num(num), run(run), data(data) {}

  void work() {
    for (int64_t i; (i = next.fetch_add(1)) < num;) {
      run(data, i);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

[[gnu::noinline]] inline void run_shared(const Pool& pool, int64_t num, void (*run)(const void*, int64_t),
                                         const void* data) {
  const int64_t num_helpers = std::min<int64_t>(pool.num_threads(), num) - 1;
  if (num_helpers < 1) {
    for (int64_t i = 0; i < num; ++i) run(data, i);
    return;
  }
  const auto progress = std::make_shared<Progress>(num, run, data);
  for (int64_t i = 0; i < num_helpers; ++i) {
    pool.schedule([](void* data) {
      auto* share = static_cast<std::shared_ptr<Progress>*>(data);
      (*share)->work();
      delete share;
    }, new std::shared_ptr<Progress>(progress));
  }
  progress->work();
  for (int spins = 0; progress->done.load(std::memory_order_acquire) < num; ++spins) {
    if (spins < 1000) pause();
    else std::this_thread::yield();  // its thread may have lost its core
  }
}

// Runs run(i) for each i of [0, num), on this thread and on whichever of the pool's comes in time.
//
// Nobody waits for a thread of the pool to begin: it may be busy, or blocked itself. This one takes all that the others
// have not begun, and a thread that comes late finds nothing left and touches only what it holds a share of.
template <typename Run>
void parallel_for(const Pool& pool, int64_t num, const Run& run) {
  run_shared(pool, num, [](const void* run, int64_t i) { (*static_cast<const Run*>(run))(i); }, &run);
}

}  // namespace jaxserve
