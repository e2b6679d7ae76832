// Kernels that are wrong in one way each, and one that is right: the test of the shim and its sanitizers. Runs the
// case that its argument names; ends with 0 only if that went unnoticed.
#include "../cuda/platform.h"

#include <cstdio>
#include <cstring>

namespace {

constexpr int kBlocks = 8;

__global__ void divergent_barrier(float* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void exit_before_barrier(float* out) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void divergent_shuffle(float* out) {
  float value = threadIdx.x;
  if (threadIdx.x % 32 < 20) value += __shfl_xor_sync(0xffffffffu, value, 1);
  out[threadIdx.x] = value;
}

__global__ void shuffle_beyond_the_block(float* out) {  // launched with 48 threads
  const float value = threadIdx.x;
  out[threadIdx.x] = value + __shfl_xor_sync(0xffffffffu, value, 16);
}

__global__ void uninitialised_shared(float* out) {
  HBERT_SHARED(float, shared, 64);
  if (threadIdx.x < 32) shared[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void outside_static_shared(float* out) {
  HBERT_SHARED(float, shared, 64);
  shared[threadIdx.x + 1] = 1;
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void outside_dynamic_shared(float* out) {
  HBERT_DYNAMIC_SHARED(float, shared);
  shared[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = shared[63 - threadIdx.x];
}

__global__ void implicit_warp_order(float* out) {
  HBERT_SHARED(float, shared, 32);
  shared[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = shared[31 - threadIdx.x];
}

// The last block to come adds up what all have left.
template <bool fences, bool tickets>
__global__ void last_block(float* out, float* partial, unsigned* count) {
  if (threadIdx.x != 0) return;
  partial[blockIdx.x] = 1;
  if (fences) __threadfence();
  unsigned before;
  if (tickets) before = atomicAdd(count, 1u);
  else before = (*count)++;
  if (fences) __threadfence();
  if (before != kBlocks - 1) return;
  float sum = 0;
  for (int i = 0; i < kBlocks; ++i) sum += partial[i];
  out[0] = sum;
}

float *out, *partial;
unsigned* count;

bool wrong_merge() { return out[0] != kBlocks; }

bool has_nan() {
  for (int i = 0; i < 64; ++i)
    if (out[i] != out[i]) return true;
  return false;
}

bool out_of_order() {
  for (int i = 0; i < 32; ++i)
    if (out[i] != 31 - i) return true;
  return false;
}

bool refused() { return cudaGetLastError() != cudaSuccess; }

// True if the result shows the mistake.
bool run(const char* name) {
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("divergent_barrier")) HBERT_LAUNCH((divergent_barrier), dim3(1), dim3(64), 0, 0, out);
  if (is("exit_before_barrier")) HBERT_LAUNCH((exit_before_barrier), dim3(1), dim3(64), 0, 0, out);
  if (is("divergent_shuffle")) HBERT_LAUNCH((divergent_shuffle), dim3(1), dim3(64), 0, 0, out);
  if (is("shuffle_beyond_the_block")) HBERT_LAUNCH((shuffle_beyond_the_block), dim3(1), dim3(48), 0, 0, out);
  if (is("uninitialised_shared")) {
    HBERT_LAUNCH((uninitialised_shared), dim3(1), dim3(64), 0, 0, out);
    return has_nan();
  }
  if (is("outside_static_shared")) HBERT_LAUNCH((outside_static_shared), dim3(1), dim3(64), 0, 0, out);
  if (is("outside_dynamic_shared")) HBERT_LAUNCH((outside_dynamic_shared), dim3(1), dim3(64), 63 * 4, 0, out);
  if (is("implicit_warp_order")) {
    HBERT_LAUNCH((implicit_warp_order), dim3(1), dim3(32), 0, 0, out);
    return out_of_order();
  }
  if (is("too_many_threads")) {
    HBERT_LAUNCH((implicit_warp_order), dim3(1), dim3(2048), 0, 0, out);
    return refused();
  }
  if (is("right")) {
    HBERT_LAUNCH((last_block<true, true>), dim3(kBlocks), dim3(32), 0, 0, out, partial, count);
    return wrong_merge();
  }
  if (is("missing_fence")) {
    HBERT_LAUNCH((last_block<false, true>), dim3(kBlocks), dim3(32), 0, 0, out, partial, count);
    return wrong_merge();
  }
  if (is("missing_atomic")) {
    HBERT_LAUNCH((last_block<true, false>), dim3(kBlocks), dim3(32), 0, 0, out, partial, count);
    return wrong_merge();
  }
  return false;
}

}  // namespace

int main(int, char** arguments) {
  out = new float[64]();
  partial = new float[kBlocks]();
  count = new unsigned(0);
  if (run(arguments[1])) {
    std::fprintf(stderr, "noticed in the result\n");
    return 1;
  }
  return 0;
}
