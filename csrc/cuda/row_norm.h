// What the forward and the backward pass of the row norms share: which threads have which row, and the activations.
#pragma once
#include "chunks.h"
#include "values.h"

namespace hbert {
namespace cuda {

constexpr int kMaxThreads = 512;
static_assert(kMaxRowWidth == kMaxThreads * kColumns, "a row is kept in the registers of one block");

inline int threads_of_row(int64_t width) {
  return static_cast<int>((width + 32 * kColumns - 1) / (32 * kColumns)) * 32;
}

// Narrow rows share a block of about `wanted` threads.
inline int rows_at_once(int row_threads, int wanted) { return row_threads < wanted ? wanted / row_threads : 1; }

// This thread's place in its block, which works on blockDim.x / threads rows at once.
struct Place {
  int threads;  // of a row: whole warps
  int group;    // the row
  int column;   // the first of kColumns
  __device__ explicit Place(int row_threads)
      : threads(row_threads), group(threadIdx.x / row_threads), column((threadIdx.x % row_threads) * kColumns) {}
};

// The sum over the threads of a row, the same in all of them. `scratch`: one float for each warp of the block, not
// those of the sum before, which other warps may still be reading.
__device__ __forceinline__ float row_sum(float v, const Place& place, float* scratch) {
  v = warp_sum(v);
  if (place.threads == 32) return v;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  const float* warps = scratch + place.group * (place.threads / 32);
  float total = 0;
  for (int i = 0; i < place.threads / 32; ++i) total += warps[i];
  return total;
}

struct Activated {
  float value, slope;
};

// erfc keeps the left tail, which 1 + erf cancels.
__device__ __forceinline__ Activated gelu(float x) {
  const float cdf = 0.5f * erfcf(x * -0.70710678118654752f);
  return {x * cdf, fmaf(x * 0.39894228040143268f, expf(-0.5f * x * x), cdf)};
}

// p = (1 + tanh u)/2 = 1/(1 + e^-2u) and 1 - p = e^-2u p, u = sqrt(2/pi)(x + 0.044715 x^3): no cancellation on
// either side.
__device__ __forceinline__ Activated gelu_tanh(float x) {
  constexpr float kScale = 0.79788456080286536f, kCubic = 0.044715f;
  const float e = expf(fminf(80.0f, x * fmaf(x * x, -2 * kScale * kCubic, -2 * kScale)));
  const float p = 1 / (1 + e);
  // Farther out p (1 - p) is 0 in exact numbers, here not quite, so that nothing may grow beside it.
  const float slope = fmaf(fminf(400.0f, x * x), 6 * kScale * kCubic, 2 * kScale);
  return {x * p, fmaf(x * p * (e * p), slope, p)};
}

__device__ __forceinline__ Activated activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kGelu: return gelu(x);
    case Activation::kGeluTanh: return gelu_tanh(x);
    case Activation::kRelu: break;
  }
  return {x <= 0 ? 0.0f : x, x > 0 ? 1.0f : 0.0f};  // NaN stays
}

}  // namespace cuda
}  // namespace hbert
