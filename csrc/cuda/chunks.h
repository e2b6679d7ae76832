// The split of packed tokens into chunks of work that a grid can be launched for without reading cu_seqlens on the
// host.
//
// A sequence is cut into chunks of C rows from its own start, so that its results do not depend on its neighbours.
// Chunk c of sequence s has slot cu_seqlens[s]/C + s + c. Because floor(a/C) + ceil(n/C) <= floor((a + n)/C) + 1,
// slots of different sequences never meet; there are at most rows/C + sequences + 1 of them, some empty. Dead rows
// are one more sequence.
#pragma once
#include "kernels.h"
#include "platform.h"

namespace hbert {
namespace cuda {

struct Chunk {
  int64_t sequence;    // the number of sequences, for dead rows
  int64_t index;       // among the chunks of the sequence
  int64_t begin, end;  // rows
};

inline int64_t num_slots(const Packing& p, int chunk) { return p.rows / chunk + p.sequences + 1; }

__device__ __forceinline__ int64_t first_slot(const Packing& p, int64_t sequence, int chunk) {
  return p.cu_seqlens[sequence] / chunk + sequence;
}

__device__ __forceinline__ int64_t num_chunks(const Packing& p, int64_t sequence, int chunk) {
  return (p.cu_seqlens[sequence + 1] - p.cu_seqlens[sequence] + chunk - 1) / chunk;
}

// The largest index in [0, sequences] for which `before(index)` holds, as it does for 0 and then up to some index.
template <class F>
__device__ __forceinline__ int64_t last_where(int64_t sequences, F before) {
  int64_t low = 0, high = sequences;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (before(middle)) low = middle;
    else high = middle - 1;
  }
  return low;
}

// The chunk of a slot; empty: begin >= end.
__device__ __forceinline__ Chunk chunk_of_slot(const Packing& p, int64_t slot, int chunk) {
  const int64_t sequence = last_where(p.sequences, [&](int64_t s) { return first_slot(p, s, chunk) <= slot; });
  const int64_t index = slot - first_slot(p, sequence, chunk);
  const int64_t begin = p.cu_seqlens[sequence] + index * chunk;
  const int64_t limit = sequence == p.sequences ? p.rows : p.cu_seqlens[sequence + 1];
  return {sequence, index, begin, begin + chunk < limit ? begin + chunk : limit};
}

// The sequence of a row; the number of sequences, for dead rows.
__device__ __forceinline__ int64_t sequence_of_row(const Packing& p, int64_t row) {
  return last_where(p.sequences, [&](int64_t s) { return p.cu_seqlens[s] <= row; });
}

}  // namespace cuda
}  // namespace hbert
