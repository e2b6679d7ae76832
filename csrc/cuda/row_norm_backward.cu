// Layer norms of rows, backward. Blocks walk over fixed sets of rows and keep sums over them: the gradients of
// weight and bias in registers, of what the source adds or multiplies in shared memory, because registers are
// short. A second launch adds up the blocks' sums (slot_sums.cu).
#include "row_norm.h"

namespace hbert {
namespace cuda {
namespace {

constexpr int kGatedChunk = 16;  // rows of a sequence
constexpr int kMinRows = 8, kMaxBlocks = 512, kThreads = 256;

bool is_gated(const RowNormBackward& a) { return a.source == RowSource::kGated; }

// Rows of a block.
int64_t rows_of_block(const RowNormBackward& a) {
  const int64_t spread = (a.packing.rows + kMaxBlocks - 1) / kMaxBlocks;
  return is_gated(a) ? kGatedChunk : spread > kMinRows ? spread : kMinRows;
}

int64_t num_blocks(const RowNormBackward& a) {
  const int64_t rows = rows_of_block(a);
  return is_gated(a) ? num_slots(a.packing, kGatedChunk) : (a.packing.rows + rows - 1) / rows;
}

// Sums that a block leaves: of dy xhat, of dy, and of what reaches the source.
int num_sums(const RowNormBackward& a) { return a.source == RowSource::kPlain ? 2 : 3; }

// What x meets in the source: the gate or the bias before the activation.
template <RowSource source>
__device__ __forceinline__ void load_other(const RowNormBackward& a, int64_t sequence, int column,
                                           float (&other)[kColumns]) {
  if constexpr (source == RowSource::kActivation) load_or(a.input_bias, 0.0f, column, a.width, a.aligned, other);
  if constexpr (source == RowSource::kGated) load(a.gate + sequence * a.width, column, a.width, a.aligned, other);
}

template <RowSource source>
__device__ __forceinline__ float normalized_value(const RowNormBackward& a, float x, float other) {
  if constexpr (source == RowSource::kGated) return x * other;
  if constexpr (source == RowSource::kActivation) return activate(a.activation, x + other).value;
  return x;
}

// The gradient of x from that of the normalized value; adds to the sum of what reaches the source.
template <RowSource source>
__device__ __forceinline__ float through_source(const RowNormBackward& a, float x, float other, float dv,
                                                float& dsource) {
  if constexpr (source == RowSource::kGated) {
    dsource = fmaf(dv, x, dsource);
    return dv * other;
  }
  if constexpr (source == RowSource::kActivation) {
    dv *= activate(a.activation, x + other).slope;
    dsource += dv;
  }
  return dv;
}

// The sums of the rows of a block, one [kColumns] per thread in shared memory, to `out` [width], in the order of
// the groups.
__device__ __forceinline__ void store_sums(const RowNormBackward& a, const Place& place, const float* sums,
                                           float* out) {
  __syncthreads();
  if (place.group == 0) {
    float total[kColumns] = {};
    for (int g = 0; g < static_cast<int>(blockDim.x) / place.threads; ++g)
#pragma unroll
      for (int k = 0; k < kColumns; ++k) total[k] += sums[k * blockDim.x + g * place.threads + threadIdx.x];
    store(out, place.column, a.width, a.aligned, total);
  }
  __syncthreads();
}

__device__ __forceinline__ void share(const float (&mine)[kColumns], float* sums) {
#pragma unroll
  for (int k = 0; k < kColumns; ++k) sums[k * blockDim.x + threadIdx.x] = mine[k];
}

template <class X, RowSource source>
__global__ void __launch_bounds__(kMaxThreads) backward_kernel(RowNormBackward a, int row_threads, int64_t block_rows) {
  constexpr bool kHasOther = source != RowSource::kPlain;
  HBERT_SHARED(float, scratch, 2 * kMaxThreads / 32);
  HBERT_DYNAMIC_SHARED(float, sums);  // [kColumns, threads]
  const Place place(row_threads);
  const int groups = blockDim.x / row_threads;
  Chunk rows{0, 0, int64_t(blockIdx.x) * block_rows, (int64_t(blockIdx.x) + 1) * block_rows};
  if constexpr (source == RowSource::kGated) rows = chunk_of_slot(a.packing, blockIdx.x, kGatedChunk);
  if (rows.end > a.packing.rows) rows.end = a.packing.rows;
  const bool alive = source != RowSource::kGated || rows.sequence < a.packing.sequences;

  float dweight[kColumns] = {}, dbias[kColumns] = {};
  if constexpr (kHasOther) share(dweight, sums);
  for (int64_t first = rows.begin; first < rows.end; first += groups) {
    const int64_t row = first + place.group, offset = row * a.width;
    const bool here = row < rows.end;
    float x[kColumns] = {}, g[kColumns] = {}, other[kColumns] = {}, mean = 0, rstd = 0;
    if (here && alive) {
      load(static_cast<const X*>(a.x) + offset, place.column, a.width, a.aligned, x);
      load(a.dy, offset, place.column, a.width, a.aligned, g);
      if constexpr (kHasOther) load_other<source>(a, rows.sequence, place.column, other);
      mean = a.mean[row];
      rstd = a.rstd[row];
    }
    float weight[kColumns], sum_g = 0, sum_gx = 0;
    load_or(a.weight, 1.0f, place.column, a.width, a.aligned, weight);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const float xhat = (normalized_value<source>(a, x[k], other[k]) - mean) * rstd;
      dweight[k] = fmaf(g[k], xhat, dweight[k]);
      dbias[k] += g[k];
      g[k] *= weight[k];
      sum_g += g[k];
      sum_gx = fmaf(g[k], xhat, sum_gx);
    }
    const float mean_g = row_sum(sum_g, place, scratch) / a.width;
    const float mean_gx = row_sum(sum_gx, place, scratch + kMaxThreads / 32) / a.width;
    if (!here) continue;
    if constexpr (kHasOther)
      if (alive) load_other<source>(a, rows.sequence, place.column, other);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const float xhat = (normalized_value<source>(a, x[k], other[k]) - mean) * rstd;
      g[k] = through_source<source>(a, x[k], other[k], rstd * (g[k] - mean_g - xhat * mean_gx),
                                    sums[k * blockDim.x + threadIdx.x]);
    }
    if constexpr (source == RowSource::kGated)
      for (float& d : g) d = alive ? d : 0.0f;
    if (source == RowSource::kPlain && a.dtotal != nullptr) {
      load(static_cast<const X*>(a.dtotal) + offset, place.column, a.width, a.aligned, x);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) g[k] += x[k];
    }
    store(static_cast<X*>(a.dx) + offset, place.column, a.width, a.aligned, g);
  }
  if (!alive || rows.begin >= rows.end) return;

  float* out = a.partial + int64_t(blockIdx.x) * (kHasOther ? 3 : 2) * a.width;
  if constexpr (kHasOther) store_sums(a, place, sums, out + 2 * a.width);
  share(dweight, sums);
  store_sums(a, place, sums, out);
  share(dbias, sums);
  store_sums(a, place, sums, out + a.width);
}

template <RowSource source>
int launch(const RowNormBackward& a, cudaStream_t stream) {
  const int row_threads = threads_of_row(a.width), threads = row_threads * rows_at_once(row_threads, kThreads);
  const dim3 grid(static_cast<unsigned>(num_blocks(a)));
  const size_t shared = threads * kColumns * sizeof(float);
  return with_type(a.dtype, [&](auto x) {
    HBERT_LAUNCH((backward_kernel<decltype(x), source>), grid, dim3(threads), shared, stream, a, row_threads,
                 rows_of_block(a));
    return static_cast<int>(cudaGetLastError());
  });
}

int launch_source(const RowNormBackward& a, cudaStream_t stream) {
  switch (a.source) {
    case RowSource::kActivation: return launch<RowSource::kActivation>(a, stream);
    case RowSource::kGated: return launch<RowSource::kGated>(a, stream);
    case RowSource::kPlain: return launch<RowSource::kPlain>(a, stream);
    case RowSource::kResidual: break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace cuda
}  // namespace hbert

HBERT_EXPORT int64_t hbert_cuda_row_norm_partial(const hbert::cuda::RowNormBackward* args) {
  using namespace hbert::cuda;
  return num_blocks(*args) * num_sums(*args) * args->width;
}

HBERT_EXPORT int hbert_cuda_row_norm_backward(const hbert::cuda::RowNormBackward* args, void* stream) {
  using namespace hbert::cuda;
  RowNormBackward a = *args;
  if (a.width < 1 || a.width > kMaxRowWidth) return cudaErrorInvalidValue;
  a.aligned = all_aligned(a.width, a.dy.data, a.dtotal, a.x, a.input_bias.data, a.gate, a.weight.data, a.dx, a.partial);
  if (num_blocks(a) > 0) {
    const int error = launch_source(a, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return error;
  }
  const int64_t width = a.width;
  SlotSums sums{a.partial, num_sums(a) * width, num_blocks(a), a.packing, kGatedChunk, {}};
  sums.sums[0] = {0, width, a.dweight, false};
  sums.sums[1] = {width, width, a.dbias, false};
  sums.sums[2] = {2 * width, width, a.dsource, is_gated(a)};
  return hbert_cuda_slot_sums(&sums, stream);
}
