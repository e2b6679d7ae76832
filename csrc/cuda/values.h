// Values of a row in registers: each thread has eight neighbouring columns, whatever the dtype, so that every
// 16-bit row takes one 16-byte load, a float32 row two, and rows of different dtypes meet in the same threads.
// Computed in float32.
#pragma once
#include "kernels.h"
#include "platform.h"

namespace hbert {
namespace cuda {

constexpr int kColumns = 8;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class X>
__device__ __forceinline__ X from_float(float v);
template <>
__device__ __forceinline__ float from_float(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float(float v) {
  return __float2half(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float v) {
  return __float2bfloat16(v);
}

template <class X>
struct alignas(16) Pack {
  X value[kColumns];
};

// Columns `first` to `first + n` of a row of `width`; 0 behind its end. `aligned` (n = kColumns only): the row
// starts at a multiple of 16 bytes, and width is a multiple of kColumns.
template <class X, int n>
__device__ __forceinline__ void load(const X* row, int first, int width, bool aligned, float (&out)[n]) {
  if constexpr (n == kColumns) {
    if (aligned && first < width) {
      const Pack<X> pack = *reinterpret_cast<const Pack<X>*>(row + first);
#pragma unroll
      for (int k = 0; k < n; ++k) out[k] = to_float(pack.value[k]);
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < n; ++k) out[k] = first + k < width ? to_float(row[first + k]) : 0.0f;
}

template <class X, int n>
__device__ __forceinline__ void store(X* row, int first, int width, bool aligned, const float (&in)[n]) {
  if constexpr (n == kColumns) {
    if (aligned && first < width) {
      Pack<X> pack;
#pragma unroll
      for (int k = 0; k < n; ++k) pack.value[k] = from_float<X>(in[k]);
      *reinterpret_cast<Pack<X>*>(row + first) = pack;
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < n; ++k)
    if (first + k < width) row[first + k] = from_float<X>(in[k]);
}

// The same for a dtype that is known at run time; `offset` is that of the row in values.
__device__ __forceinline__ void load(Values v, int64_t offset, int first, int width, bool aligned,
                                     float (&out)[kColumns]) {
  switch (v.dtype) {
    case DType::kFloat32: return load(static_cast<const float*>(v.data) + offset, first, width, aligned, out);
    case DType::kFloat16: return load(static_cast<const __half*>(v.data) + offset, first, width, aligned, out);
    case DType::kBFloat16: return load(static_cast<const __nv_bfloat16*>(v.data) + offset, first, width, aligned, out);
  }
}

// A parameter, or `fallback` where it is not given.
__device__ __forceinline__ void load_or(Values v, float fallback, int first, int width, bool aligned,
                                        float (&out)[kColumns]) {
  if (v.data != nullptr) return load(v, 0, first, width, aligned, out);
#pragma unroll
  for (int k = 0; k < kColumns; ++k) out[k] = fallback;
}

__device__ __forceinline__ void store(MutableValues v, int64_t index, float value) {
  switch (v.dtype) {
    case DType::kFloat32: static_cast<float*>(v.data)[index] = value; return;
    case DType::kFloat16: static_cast<__half*>(v.data)[index] = from_float<__half>(value); return;
    case DType::kBFloat16: static_cast<__nv_bfloat16*>(v.data)[index] = from_float<__nv_bfloat16>(value); return;
  }
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(kAllLanes, v, lanes);
  return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, lanes));
  return v;
}

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class... Pointers>
bool all_aligned(int64_t width, Pointers... pointers) {
  return width % kColumns == 0 && (is_aligned(pointers) && ...);
}

// f(X{}) with the type of a dtype.
template <class F>
int with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32: return f(float{});
    case DType::kFloat16: return f(__half{});
    case DType::kBFloat16: return f(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace hbert
