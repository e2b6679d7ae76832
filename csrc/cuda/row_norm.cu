// Layer norms of rows, forward: layer_norm, add_layer_norm, activation_layer_norm and gated_layer_norm are one
// kernel with four sources. A row is read once, stays in the registers of its threads, and is written once.
#include "row_norm.h"

namespace hbert {
namespace cuda {
namespace {

// What is normalized, in this thread's columns; 0 behind the width.
template <class X, RowSource source>
__device__ __forceinline__ void load_source(const RowNormForward& a, int64_t row, int64_t sequence, int column,
                                            float (&v)[kColumns]) {
  const int64_t offset = row * a.width;
  load(static_cast<const X*>(a.x) + offset, column, a.width, a.aligned, v);
  float other[kColumns];
  if constexpr (source == RowSource::kResidual) load(a.residual, offset, column, a.width, a.aligned, other);
  if constexpr (source == RowSource::kGated) load(a.gate + sequence * a.width, column, a.width, a.aligned, other);
  if constexpr (source == RowSource::kActivation) load_or(a.input_bias, 0.0f, column, a.width, a.aligned, other);
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    if constexpr (source == RowSource::kResidual) v[k] += other[k];
    if constexpr (source == RowSource::kGated) v[k] *= other[k];
    if constexpr (source == RowSource::kActivation) v[k] = activate(a.activation, v[k] + other[k]).value;
  }
}

template <class T>
__device__ __forceinline__ void store_rounded(T* row, const RowNormForward& a, int column, float (&v)[kColumns]) {
#pragma unroll
  for (int k = 0; k < kColumns; ++k) v[k] = to_float(from_float<T>(v[k]));
  store(row, column, a.width, a.aligned, v);
}

// The sum of x and the residual, which is normalized as stored.
__device__ __forceinline__ void store_total(const RowNormForward& a, int64_t row, int column, float (&v)[kColumns]) {
  const int64_t offset = row * a.width;
  switch (a.total.dtype) {
    case DType::kFloat32: return store(static_cast<float*>(a.total.data) + offset, column, a.width, a.aligned, v);
    case DType::kFloat16: return store_rounded(static_cast<__half*>(a.total.data) + offset, a, column, v);
    case DType::kBFloat16: return store_rounded(static_cast<__nv_bfloat16*>(a.total.data) + offset, a, column, v);
  }
}

template <class X, RowSource source>
__global__ void __launch_bounds__(kMaxThreads) forward_kernel(RowNormForward a, int row_threads) {
  HBERT_SHARED(float, scratch, 2 * kMaxThreads / 32);
  const Place place(row_threads);
  const int64_t row = int64_t(blockIdx.x) * (blockDim.x / row_threads) + place.group;
  const bool exists = row < a.packing.rows;
  int64_t sequence = 0;
  if constexpr (source == RowSource::kGated)
    if (exists) sequence = sequence_of_row(a.packing, row);
  const bool alive = exists && (source != RowSource::kGated || sequence < a.packing.sequences);
  float v[kColumns] = {};
  if (alive) load_source<X, source>(a, row, sequence, place.column, v);
  if constexpr (source == RowSource::kResidual)
    if (alive) store_total(a, row, place.column, v);

  float sum = 0;
#pragma unroll
  for (int k = 0; k < kColumns; ++k) sum += v[k];
  const float mean = row_sum(sum, place, scratch) / a.width;
  float squares = 0;
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    const float d = place.column + k < a.width ? v[k] - mean : 0.0f;
    squares = fmaf(d, d, squares);
  }
  const float variance = row_sum(squares, place, scratch + kMaxThreads / 32) / a.width;
  const float rstd = alive ? 1 / sqrtf(variance + a.eps) : 0.0f;
  if (!exists) return;

  float weight[kColumns], bias[kColumns];
  load_or(a.weight, 1.0f, place.column, a.width, a.aligned, weight);
  load_or(a.bias, 0.0f, place.column, a.width, a.aligned, bias);
#pragma unroll
  for (int k = 0; k < kColumns; ++k) v[k] = alive ? fmaf((v[k] - mean) * rstd, weight[k], bias[k]) : 0.0f;
  store(static_cast<X*>(a.y) + row * a.width, place.column, a.width, a.aligned, v);
  if (place.column == 0) {
    a.mean[row] = mean;
    a.rstd[row] = rstd;
  }
}

template <RowSource source>
int launch(const RowNormForward& a, cudaStream_t stream) {
  const int row_threads = threads_of_row(a.width), groups = rows_at_once(row_threads, 128);
  const dim3 grid(static_cast<unsigned>((a.packing.rows + groups - 1) / groups));
  return with_type(a.dtype, [&](auto x) {
    HBERT_LAUNCH((forward_kernel<decltype(x), source>), grid, dim3(row_threads * groups), 0, stream, a, row_threads);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace
}  // namespace cuda
}  // namespace hbert

HBERT_EXPORT int hbert_cuda_row_norm_forward(const hbert::cuda::RowNormForward* args, void* stream) {
  using namespace hbert::cuda;
  RowNormForward a = *args;
  if (a.width < 1 || a.width > kMaxRowWidth) return cudaErrorInvalidValue;
  if (a.packing.rows == 0) return cudaSuccess;
  a.aligned = all_aligned(a.width, a.x, a.residual.data, a.total.data, a.input_bias.data, a.gate, a.weight.data,
                          a.bias.data, a.y);
  cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (a.source) {
    case RowSource::kPlain: return launch<RowSource::kPlain>(a, on);
    case RowSource::kResidual: return launch<RowSource::kResidual>(a, on);
    case RowSource::kActivation: return launch<RowSource::kActivation>(a, on);
    case RowSource::kGated: return launch<RowSource::kGated>(a, on);
  }
  return cudaErrorInvalidValue;
}
