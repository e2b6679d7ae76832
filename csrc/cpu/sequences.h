// Packed sequences on the torch side: checked bounds, and their split into chunks of work.
#pragma once
#include <vector>

#include "norm_common.h"

namespace hbert {

// A sequence is split into chunks of this many rows from its own start, so that its results do not depend on its neighbours.
constexpr int64_t kChunkRows = 64;

struct Chunk {
  RowRange rows;
  int64_t part;  // index among the parts of split sequences, -1 if it is its whole sequence
};

struct Sequences {
  int64_t count;     // sequences
  int64_t num_rows;  // rows before the dead ones
  int64_t num_parts;
  std::vector<Chunk> chunks;
};

// Reads and checks cu_seqlens: int32 [B+1], from 0, never decreasing, at most `rows`.
inline Sequences split_sequences(const Tensor& cu_seqlens, int64_t rows, const char* op) {
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1 && cu_seqlens.scalar_type() == ScalarType::Int, op,
                  ": cu_seqlens must be int32 [B+1]");
  const Tensor dense = as_dense(cu_seqlens);
  const int32_t* bounds = static_cast<const int32_t*>(dense.const_data_ptr());
  Sequences out{dense.size(0) - 1, 0, 0, {}};
  STD_TORCH_CHECK(bounds[0] == 0, op, ": cu_seqlens must start at 0, got ", bounds[0]);
  for (int64_t s = 0; s < out.count; ++s) {
    const int64_t first = bounds[s], end = bounds[s + 1];
    STD_TORCH_CHECK(first <= end, op, ": cu_seqlens must not decrease, but cu_seqlens[", s, "] = ", first, " > ", end);
    STD_TORCH_CHECK(end <= rows, op, ": cu_seqlens reaches ", end, ", but there are only ", rows, " tokens");
    const bool whole = end - first <= kChunkRows;
    for (int64_t begin = first; begin < end; begin += kChunkRows) {
      const int64_t stop = begin + kChunkRows < end ? begin + kChunkRows : end;
      out.chunks.push_back({{begin, stop, s, first, end}, whole ? -1 : out.num_parts++});
    }
    out.num_rows = end;
  }
  return out;
}

// Chunks per task of a parallel loop.
inline int64_t chunk_grain(const Sequences& sequences, int64_t width) {
  const int64_t chunks = static_cast<int64_t>(sequences.chunks.size());
  const int64_t mean_rows = chunks == 0 ? 1 : (sequences.num_rows + chunks - 1) / chunks;
  return row_grain(width) / (mean_rows > 0 ? mean_rows : 1) + 1;
}

// Rows behind the last sequence are dead: zero.
inline void zero_dead_rows(const Tensor& t, int64_t alive) {
  const int64_t width = t.dim() == 2 ? t.size(1) : 1;
  const size_t row = width * t.element_size();
  clear(static_cast<char*>(t.mutable_data_ptr()) + alive * row, (t.size(0) - alive) * row);
}

// f(chunk, scratch) for every chunk, in parallel.
template <class F>
void for_each_chunk(const Sequences& sequences, int64_t width, size_t scratch_bytes, F f) {
  torch::stable::parallel_for(0, sequences.chunks.size(), chunk_grain(sequences, width),
                              [&](int64_t begin, int64_t end) {
                                char* scratch = workspace<Slot::kTask>(scratch_bytes);
                                for (int64_t i = begin; i < end; ++i) f(sequences.chunks[i], scratch);
                              });
}

// Fixed blocks of consecutive chunks, each with its own sums.
struct ChunkBlocks {
  int64_t per_block, count;
  explicit ChunkBlocks(const Sequences& sequences) {
    const int64_t chunks = sequences.chunks.size();
    per_block = std::max<int64_t>(1, (chunks + BlockSums::kMaxBlocks - 1) / BlockSums::kMaxBlocks);
    count = std::max<int64_t>(1, (chunks + per_block - 1) / per_block);
  }
};

// f(chunk, sums of its block, scratch) for every chunk; the chunks of a block in order.
template <class F>
void for_each_block(const Sequences& sequences, ChunkBlocks blocks, BlockSums& sums, size_t scratch_bytes, F f) {
  const int64_t chunks = sequences.chunks.size();
  torch::stable::parallel_for(0, blocks.count, 1, [&](int64_t begin, int64_t end) {
    char* scratch = workspace<Slot::kTask>(scratch_bytes);
    for (int64_t block = begin; block < end; ++block) {
      char* s = sums.start(block);
      const int64_t last = std::min((block + 1) * blocks.per_block, chunks);
      for (int64_t i = block * blocks.per_block; i < last; ++i) f(sequences.chunks[i], s, scratch);
    }
  });
}

// total[s] = the sum of the parts of sequence s, in order, each [width]; a sequence of one chunk has written its total already.
inline void add_parts(const Sequences& sequences, const char* parts, char* totals, int64_t width, DType dtype) {
  auto add = [&](auto zero) {
    using R = decltype(zero);
    for (const Chunk& chunk : sequences.chunks) {
      if (chunk.part < 0) continue;
      R* total = reinterpret_cast<R*>(totals) + chunk.rows.sequence * width;
      const R* part = reinterpret_cast<const R*>(parts) + chunk.part * width;
      for (int64_t i = 0; i < width; ++i) total[i] += part[i];
    }
  };
  dtype == DType::kFloat64 ? add(0.0) : add(0.0f);
}

}  // namespace hbert
