// Softmax pooling of packed sequences, backward: a block for each chunk of a sequence, then the sums over chunks
// (slot_sums.cu).
//
// With alpha_tj = exp(score_tj - largest_j)/sum_j: dscore_tj = alpha_tj (x_t . dpooled_j - pooled_j . dpooled_j)
// scale, dscorer_j = sum_t dscore_tj x_t, dx_t = sum_j alpha_tj dpooled_j + dscore_tj scorer_j.
#include "additive_pool.h"

namespace hbert {
namespace cuda {
namespace {

// The mean of the products with dpooled under alpha: pooled_j . dpooled_j, added up in the order of multiply_tile: where
// one row has all the weight the difference to its own product must be zero.
template <int C>
__device__ __forceinline__ void multiply_pooled(const Pool& p, const float* pooled, const Vectors& dpooled,
                                                float* mean) {
  const int lane = threadIdx.x % 32;
  for (int head = threadIdx.x / 32; head < p.heads; head += kPoolThreads / 32) {
    const int64_t offset = int64_t(head) * dpooled.size;
    float sum = 0;
    for (int i = lane * C; i < dpooled.size; i += 32 * C) {
      float a[C], b[C];
      load(pooled + offset, i, dpooled.size, C == kColumns, a);
      load(dpooled.base + offset, i, dpooled.size, C == kColumns, b);
#pragma unroll
      for (int k = 0; k < C; ++k) sum = fmaf(a[k], b[k], sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) mean[head] = sum;
  }
}

// Scores and products with dpooled become alpha and dscore; 0 behind the last row and head.
__device__ __forceinline__ void differentiate(const Pool& p, int count, const float* softmax, const float* mean,
                                              float* alpha, float* dscore) {
  const int stride = table_stride(p.heads);
  for (int i = threadIdx.x; i < kPoolChunk * stride; i += kPoolThreads) {
    const int head = i % stride;
    const bool valid = i / stride < count && head < p.heads;
    const float a = valid ? expf(alpha[i] * p.scale - softmax[head]) / softmax[p.heads + head] : 0.0f;
    dscore[i] = valid ? a * (dscore[i] - mean[head]) * p.scale : 0.0f;
    alpha[i] = a;
  }
}

// sums[r] += sum_j table[t + r, j] vector_j in this thread's columns.
template <int C>
__device__ __forceinline__ void add_vectors(const Pool& p, const float* table, const Vectors& vectors, int t,
                                            int column, float (&sums)[kTileRows][C]) {
  const int stride = table_stride(p.heads);
  float v[C];
  if (vectors.x_step == 0) {
#pragma unroll 1
    for (int j = 0; j < p.heads; ++j) {
      load(vectors.base + int64_t(j) * p.width, column, p.width, C == kColumns, v);
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        const float weight = table[(t + r) * stride + j];
#pragma unroll
        for (int k = 0; k < C; ++k) sums[r][k] = fmaf(weight, v[k], sums[r][k]);
      }
    }
    return;
  }
  int heads[C];
  heads_of_columns(p, column, heads);
  load(vectors.base, column, p.width, C == kColumns, v);
#pragma unroll
  for (int r = 0; r < kTileRows; ++r)
#pragma unroll
    for (int k = 0; k < C; ++k) sums[r][k] = fmaf(table[(t + r) * stride + heads[k]], v[k], sums[r][k]);
}

template <class X, int C>
__device__ __forceinline__ void store_input_gradients(const PoolBackward& a, const Chunk& chunk, const float* alpha,
                                                      const Vectors& dpooled, const float* dscore,
                                                      const Vectors& scorer) {
  const Pool& p = a.pool;
  const int count = static_cast<int>(chunk.end - chunk.begin), steps = (p.width + C - 1) / C;
  for (int item = threadIdx.x; item < (count + kTileRows - 1) / kTileRows * steps; item += kPoolThreads) {
    const int t = item / steps * kTileRows, column = item % steps * C;
    float sums[kTileRows][C] = {};
    add_vectors(p, dscore, scorer, t, column, sums);
    add_vectors(p, alpha, dpooled, t, column, sums);
    X* out = static_cast<X*>(a.dx) + (chunk.begin + t) * p.width;
#pragma unroll
    for (int r = 0; r < kTileRows; ++r)
      if (t + r < count) store(out + int64_t(r) * p.width, column, p.width, C == kColumns, sums[r]);
  }
}

template <class X>
__device__ __forceinline__ void store_zeros(const PoolBackward& a, const Chunk& chunk) {
  X* out = static_cast<X*>(a.dx);
  for (int64_t i = chunk.begin * a.pool.width + threadIdx.x; i < chunk.end * a.pool.width; i += kPoolThreads)
    out[i] = from_float<X>(0.0f);
}

template <class X, int C>
__global__ void __launch_bounds__(kPoolThreads, 3) backward_kernel(PoolBackward a, int64_t slot_size) {
  HBERT_DYNAMIC_SHARED(float, alpha);
  HBERT_SHARED(float, mean, kMaxPoolHeads);
  const Pool& p = a.pool;
  float* dscore = alpha + kPoolChunk * table_stride(p.heads);
  const Chunk chunk = chunk_of_slot(p.packing, blockIdx.x, kPoolChunk);
  if (chunk.begin >= chunk.end) return;
  if (chunk.sequence == p.packing.sequences) return store_zeros<X>(a, chunk);
  const int64_t values = p.full_output ? int64_t(p.heads) * p.width : p.width;
  const Vectors scorer = vectors_of(p, p.dense_scorer, scorer_of(p, chunk.sequence));
  const Vectors dpooled = vectors_of(p, p.full_output, a.dpooled + chunk.sequence * values);
  multiply_rows<X, C>(p, chunk, scorer, alpha);
  multiply_rows<X, C>(p, chunk, dpooled, dscore);
  multiply_pooled<C>(p, a.pooled + chunk.sequence * values, dpooled, mean);
  __syncthreads();
  differentiate(p, static_cast<int>(chunk.end - chunk.begin), a.softmax + chunk.sequence * 2 * p.heads, mean, alpha,
                dscore);
  __syncthreads();
  sum_rows<X, C>(p, chunk, p.dense_scorer, dscore, p.partial + int64_t(blockIdx.x) * slot_size);
  store_input_gradients<X, C>(a, chunk, alpha, dpooled, dscore, scorer);
}

}  // namespace
}  // namespace cuda
}  // namespace hbert

HBERT_EXPORT int hbert_cuda_pool_backward(const hbert::cuda::PoolBackward* args, void* stream) {
  using namespace hbert::cuda;
  PoolBackward a = *args;
  Pool& p = a.pool;
  if (p.heads < 1 || p.heads > kMaxPoolHeads || p.width % p.heads != 0) return cudaErrorInvalidValue;
  const bool aligned = all_aligned(p.width / p.heads, p.x, p.scorer, p.partial, a.pooled, a.dpooled, a.dx);
  const int64_t values = vector_values(p, p.dense_scorer), slot_size = round_up(values);
  const unsigned slots = static_cast<unsigned>(num_slots(p.packing, kPoolChunk));
  const int error = with_type_and_columns(p.dtype, aligned, [&](auto x, auto columns) {
    HBERT_LAUNCH((backward_kernel<decltype(x), columns()>), dim3(slots), dim3(kPoolThreads), 2 * table_bytes(p.heads),
                 static_cast<cudaStream_t>(stream), a, slot_size);
    return static_cast<int>(cudaGetLastError());
  });
  if (error != cudaSuccess) return error;
  SlotSums sums{p.partial, slot_size, slots, p.packing, kPoolChunk, {}};
  sums.sums[0] = {0, values, {a.dscorer, DType::kFloat32}, p.scorer_stride != 0};
  return hbert_cuda_slot_sums(&sums, stream);
}
