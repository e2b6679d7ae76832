// Runs CUDA kernels on a CPU, for tests: the .cu files compile unchanged as C++ (-x c++ -DHBERT_CUDA_ON_CPU), a fiber
// per thread, one block at a time, threads, warps and blocks in random order. The scheduler, cuda_shim.cpp, is compiled
// without sanitizers; the kernels may have them:
//
// none       results; misuse of barriers, shuffles and launches (aborts with the block, the thread and the line)
// address    also accesses outside of global, static and dynamic shared memory; with undefined, misaligned ones
// thread     also data races: a missing barrier, fence or atomic, whether the schedule hides it or not
//
// Shared memory is of exact size and filled with NaN for each block. Not modelled: inline PTX, cp.async, tensor cores,
// clusters, grid-wide synchronisation, fast-math rounding.
#pragma once
#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __shared__
#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

// The exchange between lanes is synchronisation itself, in memory that the scheduler owns.
#if defined(__SANITIZE_THREAD__)
#define HBERT_SHIM_UNCHECKED __attribute__((no_sanitize("thread"), noinline))
#else
#define HBERT_SHIM_UNCHECKED
#endif

namespace hbert_shim {

struct Thread {
  uint3 index, block_index;
  dim3 block_size, grid_size;
  int linear;
};
extern Thread current;  // rewritten whenever another thread runs
extern cudaError_t last_error;

cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);
void barrier(const char* file, int line);
void warp_barrier(unsigned mask, const char* file, int line);
// The values of all lanes; the lanes of the mask wait for each other.
const uint64_t* exchange(unsigned mask, uint64_t value, const char* file, int line);
void check_source_lane(int lane);
void* static_shared(const void* key, size_t bytes);
void* dynamic_shared();
// Relaxed atomics order nothing. A fence before an atomic publishes, one after it receives, as in the PTX memory
// model.
void before_atomic(void* address);
void after_atomic(void* address);
void fence();

inline int lane() { return current.linear & 31; }

template <class T>
HBERT_SHIM_UNCHECKED T from_lane(unsigned mask, T value, int source, const char* file, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle takes up to 8 bytes");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  const uint64_t* values = exchange(mask, bits, file, line);
  check_source_lane(source);
  T result;
  __builtin_memcpy(&result, values + source, sizeof(T));
  return result;
}

template <class T>
T shuffle_xor(const char* file, int line, unsigned mask, T value, int lanes) {
  return from_lane(mask, value, lane() ^ lanes, file, line);
}

template <class T>
T shuffle(const char* file, int line, unsigned mask, T value, int source) {
  return from_lane(mask, value, source & 31, file, line);
}

template <class T, class F>
T atomic(T* address, F next) {
  T before, after;
  before_atomic(address);
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  do after = next(before);
  while (!__atomic_compare_exchange(address, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  after_atomic(address);
  return before;
}

}  // namespace hbert_shim

#define threadIdx (hbert_shim::current.index)
#define blockIdx (hbert_shim::current.block_index)
#define blockDim (hbert_shim::current.block_size)
#define gridDim (hbert_shim::current.grid_size)
#define __syncthreads() hbert_shim::barrier(__FILE__, __LINE__)
#define __syncwarp() hbert_shim::warp_barrier(0xffffffffu, __FILE__, __LINE__)
#define __shfl_xor_sync(...) hbert_shim::shuffle_xor(__FILE__, __LINE__, __VA_ARGS__)
#define __shfl_sync(...) hbert_shim::shuffle(__FILE__, __LINE__, __VA_ARGS__)

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return hbert_shim::atomic(address, [value](unsigned before) { return before + value; });
}
inline int min(int a, int b) { return b < a ? b : a; }
inline void __threadfence() { hbert_shim::fence(); }
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = hbert_shim::last_error;
  hbert_shim::last_error = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration" : "invalid value";
}

#define HBERT_SHARED(T, name, count)     \
  static const char name##_identity = 0; \
  T(&name)[count] = *reinterpret_cast<T(*)[count]>(hbert_shim::static_shared(&name##_identity, sizeof(T) * (count)))
#define HBERT_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(hbert_shim::dynamic_shared())
#define HBERT_UNPACK(...) __VA_ARGS__
#define HBERT_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), hbert_shim::last_error =                          \
                       hbert_shim::launch((grid), (block), (shared_bytes), [=] { HBERT_UNPACK kernel(__VA_ARGS__); }))
