// What the forward and the backward pass of additive pooling share: products of a chunk's rows with tables of
// vectors, one per head, and sums of its rows weighted per head. A block has one chunk; tables [kPoolChunk, stride]
// in shared memory hold a value for each row and head, with heads rounded up to whole groups.
#pragma once
#include <type_traits>

#include "chunks.h"
#include "values.h"

namespace hbert {
namespace cuda {

constexpr int kPoolChunk = 64;  // rows of a sequence
constexpr int kPoolThreads = 128;
constexpr int kTileRows = 4, kTileHeads = 4;

__device__ __forceinline__ int table_stride(int heads) { return (heads + kTileHeads - 1) / kTileHeads * kTileHeads; }

inline size_t table_bytes(int heads) {
  return sizeof(float) * kPoolChunk * ((heads + kTileHeads - 1) / kTileHeads * kTileHeads);
}

// Vectors, one per head: each spans whole rows of x (x_step 0), or the head's own slice of them.
struct Vectors {
  const float* base;
  int size;
  int x_step;  // from the values of x that meet one head's vector to those of the next
};

__device__ __forceinline__ Vectors vectors_of(const Pool& p, bool dense, const float* base) {
  const int slice = p.width / p.heads;
  return {base, dense ? p.width : slice, dense ? 0 : slice};
}

// The sums over the lanes of n values, one in each lane: that of value lane n/32. Halves are exchanged, so that n
// values take n shuffles; the order of additions is that of warp_sum.
template <int n>
__device__ __forceinline__ float sum_transposed(float (&v)[n]) {
  int lanes = 16;
#pragma unroll
  for (int left = n / 2; left > 0; left /= 2, lanes /= 2) {
    const bool upper = threadIdx.x & lanes;
#pragma unroll
    for (int i = 0; i < left; ++i) {
      const float keep = upper ? v[i + left] : v[i], send = upper ? v[i] : v[i + left];
      v[i] = keep + __shfl_xor_sync(kAllLanes, send, lanes);
    }
  }
#pragma unroll
  for (; lanes > 0; lanes /= 2) v[0] += __shfl_xor_sync(kAllLanes, v[0], lanes);
  return v[0];
}

// table[r, j] = x_r . vector_j for the rows of a tile and J heads from `head` on; rows and heads behind the end
// repeat the last one.
template <int J, int C, class X>
__device__ __forceinline__ void multiply_tile(const Pool& p, const X* rows, int count, const Vectors& vectors, int head,
                                              float* table) {
  float sums[kTileRows * J] = {};
  rows += head * vectors.x_step;
#pragma unroll 1
  for (int i = threadIdx.x % 32 * C; i < vectors.size; i += 32 * C) {
    float x[kTileRows][C];
#pragma unroll
    for (int r = 0; r < kTileRows; ++r)
      load(rows + int64_t(min(r, count - 1)) * p.width, i, vectors.size, C == kColumns, x[r]);
#pragma unroll
    for (int j = 0; j < J; ++j) {
      float w[C];
      load(vectors.base + int64_t(min(head + j, p.heads - 1)) * vectors.size, i, vectors.size, C == kColumns, w);
#pragma unroll
      for (int r = 0; r < kTileRows; ++r)
#pragma unroll
        for (int k = 0; k < C; ++k) sums[r * J + j] = fmaf(x[r][k], w[k], sums[r * J + j]);
    }
  }
  const float product = sum_transposed(sums);
  constexpr int kCopies = 32 / (kTileRows * J);
  const int value = threadIdx.x % 32 / kCopies;
  if (threadIdx.x % kCopies == 0) table[value / J * table_stride(p.heads) + head + value % J] = product;
}

// table[t, j] = x_t . vector_j for all rows of the chunk, one tile per warp at a time. Entries behind the end mean
// nothing.
template <class X, int C>
__device__ __forceinline__ void multiply_rows(const Pool& p, const Chunk& chunk, const Vectors& vectors, float* table) {
  const int count = static_cast<int>(chunk.end - chunk.begin), stride = table_stride(p.heads);
  for (int t = threadIdx.x / 32 * kTileRows; t < count; t += kPoolThreads / 32 * kTileRows) {
    const X* rows = static_cast<const X*>(p.x) + (chunk.begin + t) * p.width;
    if (vectors.x_step == 0) {
#pragma unroll 1
      for (int head = 0; head < p.heads; head += kTileHeads)
        multiply_tile<kTileHeads, C>(p, rows, count - t, vectors, head, table + t * stride);
    } else {
#pragma unroll 1
      for (int head = 0; head < p.heads; ++head)
        multiply_tile<1, C>(p, rows, count - t, vectors, head, table + t * stride);
    }
  }
}

// out_j = sum_t table[t, j] x_t over the chunk, whole rows.
template <class X, int C>
__device__ __forceinline__ void sum_whole_rows(const Pool& p, const Chunk& chunk, const float* table, float* out) {
  const int count = static_cast<int>(chunk.end - chunk.begin), stride = table_stride(p.heads);
  const int steps = (p.width + C - 1) / C;
  for (int item = threadIdx.x; item < stride / kTileHeads * steps; item += kPoolThreads) {
    const int head = item / steps * kTileHeads, column = item % steps * C;
    const X* row = static_cast<const X*>(p.x) + chunk.begin * p.width;
    float sums[kTileHeads][C] = {};
#pragma unroll 2
    for (int t = 0; t < count; ++t, row += p.width) {
      float x[C];
      load(row, column, p.width, C == kColumns, x);
#pragma unroll
      for (int j = 0; j < kTileHeads; ++j) {
        const float weight = table[t * stride + head + j];
#pragma unroll
        for (int k = 0; k < C; ++k) sums[j][k] = fmaf(weight, x[k], sums[j][k]);
      }
    }
#pragma unroll
    for (int j = 0; j < kTileHeads; ++j)
      if (head + j < p.heads) store(out + int64_t(head + j) * p.width, column, p.width, C == kColumns, sums[j]);
  }
}

// The heads of neighbouring columns, behind the width the last one.
template <int C>
__device__ __forceinline__ void heads_of_columns(const Pool& p, int column, int (&heads)[C]) {
#pragma unroll
  for (int k = 0; k < C; ++k) heads[k] = min((column + k) / (p.width / p.heads), p.heads - 1);
}

// The same, each head its own slice: out [width].
template <class X, int C>
__device__ __forceinline__ void sum_slices(const Pool& p, const Chunk& chunk, const float* table, float* out) {
  const int count = static_cast<int>(chunk.end - chunk.begin), stride = table_stride(p.heads);
  for (int column = threadIdx.x * C; column < p.width; column += kPoolThreads * C) {
    int heads[C];
    heads_of_columns(p, column, heads);
    const X* row = static_cast<const X*>(p.x) + chunk.begin * p.width;
    float sums[C] = {};
#pragma unroll 2
    for (int t = 0; t < count; ++t, row += p.width) {
      float x[C];
      load(row, column, p.width, C == kColumns, x);
#pragma unroll
      for (int k = 0; k < C; ++k) sums[k] = fmaf(table[t * stride + heads[k]], x[k], sums[k]);
    }
    store(out, column, p.width, C == kColumns, sums);
  }
}

template <class X, int C>
__device__ __forceinline__ void sum_rows(const Pool& p, const Chunk& chunk, bool whole, const float* table,
                                         float* out) {
  if (whole) sum_whole_rows<X, C>(p, chunk, table, out);
  else sum_slices<X, C>(p, chunk, table, out);
}

__device__ __forceinline__ const float* scorer_of(const Pool& p, int64_t sequence) {
  return p.scorer + sequence * p.scorer_stride;
}

// Values of all heads' vectors.
inline int64_t vector_values(const Pool& p, bool dense) { return dense ? int64_t(p.heads) * p.width : p.width; }

inline int64_t round_up(int64_t n) { return (n + kColumns - 1) / kColumns * kColumns; }

// f(X{}, C) with the type of a dtype and the columns of a thread as a constant.
template <class F>
int with_type_and_columns(DType dtype, bool aligned, F f) {
  return with_type(dtype, [&](auto x) {
    return aligned ? f(x, std::integral_constant<int, kColumns>{}) : f(x, std::integral_constant<int, 1>{});
  });
}

}  // namespace cuda
}  // namespace hbert
