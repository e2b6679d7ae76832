// What a kernel file needs of its compiler: nvcc, or a C++ compiler and csrc/testing/cuda_shim.h, which runs
// kernels on a CPU.
#pragma once
#if defined(HBERT_CUDA_ON_CPU)
#include "../testing/cuda_shim.h"
#else
#include <cuda_runtime.h>

#define HBERT_SHARED(T, name, count) __shared__ T name[count]
#define HBERT_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char hbert_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(hbert_dynamic_shared)
#define HBERT_UNPACK(...) __VA_ARGS__
#define HBERT_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  HBERT_UNPACK kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>
