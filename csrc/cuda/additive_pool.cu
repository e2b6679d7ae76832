// Softmax pooling of packed sequences, forward: a block for each chunk of a sequence, then a launch that merges the
// chunks of a sequence in order. Scores and sums are of one pass over a chunk, whose rows stay in the cache.
#include "additive_pool.h"

namespace hbert {
namespace cuda {
namespace {

// A slot of the partial results: heads vectors, the largest score of each head, and the sum of exp(score -
// largest).
__host__ __device__ __forceinline__ int64_t values_of(const Pool& p) {
  return p.full_output ? int64_t(p.heads) * p.width : p.width;
}

int64_t slot_values(const Pool& p) { return round_up(values_of(p) + 2 * p.heads); }

// Scores of the chunk become exp(score - largest of the chunk); a warp for each head.
__device__ __forceinline__ void exponentiate(const Pool& p, int count, float* table, float* largest, float* sums) {
  const int stride = table_stride(p.heads), lane = threadIdx.x % 32;
  for (int head = threadIdx.x / 32; head < p.heads; head += kPoolThreads / 32) {
    float top = -INFINITY, sum = 0;
    for (int t = lane; t < count; t += 32) top = fmaxf(top, table[t * stride + head] * p.scale);
    top = warp_max(top);
    for (int t = lane; t < count; t += 32) {
      const float weight = expf(table[t * stride + head] * p.scale - top);
      table[t * stride + head] = weight;
      sum += weight;
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      largest[head] = top;
      sums[head] = sum;
    }
  }
}

template <class X, int C>
__global__ void __launch_bounds__(kPoolThreads, 3) chunk_kernel(Pool p, int64_t slot_size) {
  HBERT_DYNAMIC_SHARED(float, table);
  const Chunk chunk = chunk_of_slot(p.packing, blockIdx.x, kPoolChunk);
  if (chunk.sequence == p.packing.sequences || chunk.begin >= chunk.end) return;
  float* out = p.partial + int64_t(blockIdx.x) * slot_size;
  float* largest = out + values_of(p);
  multiply_rows<X, C>(p, chunk, vectors_of(p, p.dense_scorer, scorer_of(p, chunk.sequence)), table);
  __syncthreads();
  exponentiate(p, static_cast<int>(chunk.end - chunk.begin), table, largest, largest + p.heads);
  __syncthreads();
  sum_rows<X, C>(p, chunk, p.full_output, table, out);
}

// grid (sequences, values / blockDim.x)
__global__ void __launch_bounds__(kPoolThreads) merge_kernel(PoolForward a, int64_t slot_size) {
  const Pool& p = a.pool;
  const int64_t values = values_of(p), i = int64_t(blockIdx.y) * blockDim.x + threadIdx.x, sequence = blockIdx.x;
  if (i >= values) return;
  const int64_t vector = p.full_output ? p.width : p.width / p.heads,
                chunks = num_chunks(p.packing, sequence, kPoolChunk);
  const int head = static_cast<int>(i / vector);
  const float* slots = p.partial + first_slot(p.packing, sequence, kPoolChunk) * slot_size;
  const float *largest = slots + values + head, *sums = largest + p.heads;
  float top = -INFINITY, sum = 0, total = 0;
  for (int64_t c = 0; c < chunks; ++c) top = fmaxf(top, largest[c * slot_size]);
  for (int64_t c = 0; c < chunks; ++c) sum = fmaf(sums[c * slot_size], expf(largest[c * slot_size] - top), sum);
  for (int64_t c = 0; c < chunks; ++c)
    total = fmaf(slots[c * slot_size + i], expf(largest[c * slot_size] - top) / sum, total);
  a.pooled[sequence * values + i] = total;
  if (i % vector == 0) {
    a.softmax[sequence * 2 * p.heads + head] = chunks > 0 ? top : 0.0f;
    a.softmax[sequence * 2 * p.heads + p.heads + head] = sum;
  }
}

}  // namespace
}  // namespace cuda
}  // namespace hbert

HBERT_EXPORT int64_t hbert_cuda_pool_partial(const hbert::cuda::Pool* pool, bool backward) {
  using namespace hbert::cuda;
  return num_slots(pool->packing, kPoolChunk) *
         (backward ? round_up(vector_values(*pool, pool->dense_scorer)) : slot_values(*pool));
}

HBERT_EXPORT int hbert_cuda_pool_forward(const hbert::cuda::PoolForward* args, void* stream) {
  using namespace hbert::cuda;
  PoolForward a = *args;
  Pool& p = a.pool;
  if (p.heads < 1 || p.heads > kMaxPoolHeads || p.width % p.heads != 0) return cudaErrorInvalidValue;
  if (p.packing.sequences == 0) return cudaSuccess;
  const bool aligned = all_aligned(p.width / p.heads, p.x, p.scorer, p.partial);
  const int64_t slot_size = slot_values(p), values = values_of(p);
  const int error = with_type_and_columns(p.dtype, aligned, [&](auto x, auto columns) {
    HBERT_LAUNCH((chunk_kernel<decltype(x), columns()>), dim3(static_cast<unsigned>(num_slots(p.packing, kPoolChunk))),
                 dim3(kPoolThreads), table_bytes(p.heads), static_cast<cudaStream_t>(stream), p, slot_size);
    return static_cast<int>(cudaGetLastError());
  });
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(p.packing.sequences),
                  static_cast<unsigned>((values + kPoolThreads - 1) / kPoolThreads));
  HBERT_LAUNCH((merge_kernel), grid, dim3(kPoolThreads), 0, static_cast<cudaStream_t>(stream), a, slot_size);
  return cudaGetLastError();
}
