// Adds up the partial results of slots: the second launch of every backward pass. No atomics, so the order is
// fixed.
#include "chunks.h"
#include "values.h"

namespace hbert {
namespace cuda {
namespace {

constexpr int kLanes = 32, kRows = 8;  // of a block: columns, and slots that are read side by side

// Sum of column `i` over the slots of a sequence, of which this thread takes every kRows-th.
__device__ float sum_sequence(const SlotSums& a, int64_t sequence, int64_t i) {
  const float* slots = a.partial + first_slot(a.packing, sequence, a.chunk) * a.stride + i;
  const int64_t count = num_chunks(a.packing, sequence, a.chunk);
  float sum = 0;
  for (int64_t c = threadIdx.y; c < count; c += kRows) sum += slots[c * a.stride];
  return sum;
}

// The same over all slots; those behind a sequence's last chunk hold nothing.
__device__ float sum_all(const SlotSums& a, int64_t i) {
  const bool packed = a.packing.cu_seqlens != nullptr;
  const int64_t slots = packed ? first_slot(a.packing, a.packing.sequences, a.chunk) : a.slots;
  int64_t sequence = 0;
  float sum = 0;
  for (int64_t slot = threadIdx.y; slot < slots; slot += kRows) {
    if (packed) {
      while (first_slot(a.packing, sequence + 1, a.chunk) <= slot) ++sequence;
      if (slot - first_slot(a.packing, sequence, a.chunk) >= num_chunks(a.packing, sequence, a.chunk)) continue;
    }
    sum += a.partial[slot * a.stride + i];
  }
  return sum;
}

// grid (results, columns / kLanes): first the sums over all slots, then one result per sequence.
__global__ void __launch_bounds__(kLanes* kRows) slot_sums_kernel(SlotSums a) {
  HBERT_SHARED(float, partial, kRows* kLanes);
  int64_t result = blockIdx.x;
  int which = 0;
  while (result >= (a.sums[which].per_sequence ? a.packing.sequences : 1)) {
    result -= a.sums[which].per_sequence ? a.packing.sequences : 1;
    ++which;
  }
  const SlotSum sum = a.sums[which];
  if (sum.out.data == nullptr) return;
  const int64_t column = int64_t(blockIdx.y) * kLanes + threadIdx.x;
  float mine = 0;
  if (column < sum.width)
    mine = sum.per_sequence ? sum_sequence(a, result, sum.offset + column) : sum_all(a, sum.offset + column);
  partial[threadIdx.y * kLanes + threadIdx.x] = mine;
  __syncthreads();
  if (threadIdx.y != 0 || column >= sum.width) return;
  float total = 0;
  for (int r = 0; r < kRows; ++r) total += partial[r * kLanes + threadIdx.x];
  store(sum.out, result * sum.width + column, total);
}

}  // namespace
}  // namespace cuda
}  // namespace hbert

HBERT_EXPORT int hbert_cuda_slot_sums(const hbert::cuda::SlotSums* args, void* stream) {
  using namespace hbert::cuda;
  int64_t results = 0, width = 0;
  bool wanted = false;
  for (const SlotSum& sum : args->sums) {
    results += sum.per_sequence ? args->packing.sequences : 1;
    width = sum.width > width ? sum.width : width;
    wanted |= sum.out.data != nullptr;
  }
  if (!wanted || results == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(results), static_cast<unsigned>((width + kLanes - 1) / kLanes));
  HBERT_LAUNCH((slot_sums_kernel), grid, dim3(kLanes, kRows), 0, static_cast<cudaStream_t>(stream), *args);
  return cudaGetLastError();
}
