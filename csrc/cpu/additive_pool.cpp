// Ops additive_pool and additive_pool_backward on the CPU: checks, allocation, parallel loops over chunks of sequences.
#include "additive_pool.h"

#include "denormals.h"
#include "ops.h"

namespace hbert {
namespace {

#define HBERT_TABLE(level) &level::kPool,
constexpr const PoolKernels* kTables[] = {HBERT_FOR_CODE_LEVELS(HBERT_TABLE)};
#undef HBERT_TABLE

int64_t output_width(const PoolProblem& p) { return p.full_output ? p.width : p.head_dim; }

// Checks the shapes and fills all but the pointers; the scorer may be [h, H] or [h, d], or one of them for each
// sequence, in the compute dtype.
PoolProblem describe(const Tensor& x, const Tensor& scorer, const Sequences& sequences, int64_t heads, bool full,
                     double scale, const char* op) {
  const Rows rows = check_rows(x, op);
  STD_TORCH_CHECK(heads >= 1 && heads <= kMaxPoolHeads && rows.width % heads == 0, op,
                  ": heads must divide the width and be at most ", kMaxPoolHeads);
  PoolProblem p{};
  p.width = rows.width;
  p.heads = heads;
  p.head_dim = rows.width / heads;
  p.full_output = full;
  p.scale = scale;
  p.x_dtype = dtype_of(x, op, "x");
  const int64_t last = scorer.size(scorer.dim() - 1);
  p.dense_scorer = last == p.width;
  p.scorer_stride = scorer.dim() == 3 ? heads * last : 0;
  const bool shared = scorer.dim() == 2 && scorer.size(0) == heads;
  const bool own = scorer.dim() == 3 && scorer.size(0) == sequences.count && scorer.size(1) == heads;
  STD_TORCH_CHECK((shared || own) && (p.dense_scorer || last == p.head_dim), op,
                  ": scorer must be [h, H] or [h, d], or one of them for each sequence");
  STD_TORCH_CHECK(scorer.scalar_type() == compute_type(p.x_dtype), op, ": scorer must have the compute dtype");
  return p;
}

Tensor new_pooled(const PoolProblem& p, int64_t sequences) {
  const ScalarType dtype = compute_type(p.x_dtype);
  if (p.full_output) return allocate_zeros({sequences, p.heads, p.width}, dtype);
  return allocate_zeros({sequences, p.width}, dtype);
}

}  // namespace

std::tuple<Tensor, Tensor> additive_pool(const Tensor& x, const Tensor& scorer, const Tensor& cu_seqlens, int64_t heads,
                                         bool full, double scale) {
  const char* op = "additive_pool";
  const Sequences sequences = split_sequences(cu_seqlens, x.size(0), op);
  PoolProblem p = describe(x, scorer, sequences, heads, full, scale, op);
  const Tensor dense = as_dense(x), dense_scorer = as_dense(scorer);
  p.x = dense.const_data_ptr();
  p.scorer = dense_scorer.const_data_ptr();
  Tensor pooled = new_pooled(p, sequences.count);  // zero for empty sequences
  Tensor softmax = allocate_zeros({sequences.count, 2, heads}, compute_type(p.x_dtype));
  const size_t size = compute_size(p.x_dtype);
  const int64_t table = heads * output_width(p), stride = table + 2 * heads, chunks = sequences.chunks.size();
  char* memory = workspace<Slot::kCall>(chunks * stride * size);
  auto part_at = [&](int64_t chunk) -> PoolPart {
    char* part = memory + chunk * stride * size;
    return {part + table * size, part + (table + heads) * size, part};
  };
  const PoolKernels& k = table_for(p.x_dtype, kTables);
  torch::stable::parallel_for(0, chunks, chunk_grain(sequences, p.width), [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    for (int64_t i = begin; i < end; ++i) k.forward(p, sequences.chunks[i].rows, part_at(i));
  });
  char* out = static_cast<char*>(pooled.mutable_data_ptr());
  char* out_softmax = static_cast<char*>(softmax.mutable_data_ptr());
  torch::stable::parallel_for(0, chunks, row_grain(table), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const RowRange& rows = sequences.chunks[i].rows;
      if (rows.begin != rows.first_row) continue;  // the first chunk of a sequence merges all of them
      const int64_t count = (rows.end_row - rows.first_row + kChunkRows - 1) / kChunkRows;
      k.merge(p, part_at(i), stride, count, out + rows.sequence * table * size,
              out_softmax + rows.sequence * 2 * heads * size);
    }
  });
  return {pooled, softmax};
}

Tensor additive_pool_backward_into(const Tensor& dx, bool accumulate, const Tensor& dpooled, const Tensor& x,
                                   const Tensor& scorer, const Tensor& cu_seqlens, const Tensor& pooled,
                                   const Tensor& softmax, int64_t heads, bool full, double scale) {
  const char* op = "additive_pool_backward";
  const Sequences sequences = split_sequences(cu_seqlens, x.size(0), op);
  PoolProblem p = describe(x, scorer, sequences, heads, full, scale, op);
  const Tensor dense = as_dense(x), dense_scorer = as_dense(scorer), dense_pooled = as_dense(pooled),
               dense_dpooled = as_dense(dpooled), dense_softmax = as_dense(softmax);
  const int64_t table = heads * output_width(p);
  for (const Tensor* t : {&dense_pooled, &dense_dpooled})
    STD_TORCH_CHECK(t->numel() == sequences.count * table && t->scalar_type() == compute_type(p.x_dtype), op,
                    ": pooled and dpooled must have the shape and dtype of the output");
  STD_TORCH_CHECK(softmax.numel() == sequences.count * 2 * heads && softmax.scalar_type() == compute_type(p.x_dtype),
                  op, ": softmax must be [B, 2, h] in the compute dtype");
  p.x = dense.const_data_ptr();
  p.scorer = dense_scorer.const_data_ptr();
  Tensor dscorer = allocate_zeros(scorer.sizes(), scorer.scalar_type());
  const PoolGradient g{dense_softmax.const_data_ptr(), dense_pooled.const_data_ptr(), dense_dpooled.const_data_ptr(),
                       dx.mutable_data_ptr(), accumulate};
  const PoolKernels& k = table_for(p.x_dtype, kTables);
  const size_t size = compute_size(p.x_dtype);
  const int64_t scorer_values = heads * (p.dense_scorer ? p.width : p.head_dim);
  const ChunkBlocks blocks(sequences);
  if (p.scorer_stride == 0) {
    BlockSums sums(workspace<Slot::kCall>(BlockSums::bytes(blocks.count, scorer_values, p.x_dtype)), blocks.count,
                   scorer_values, p.x_dtype);
    for_each_block(sequences, blocks, sums, 0, [&](const Chunk& chunk, char* s, char*) {
      const FlushDenormals flush;
      k.backward(p, g, chunk.rows, s);
    });
    sums.finish(0, dscorer);
  } else {
    const size_t parts_bytes = sequences.num_parts * scorer_values * size;
    char* parts = workspace<Slot::kCall>(parts_bytes);
    clear(parts, parts_bytes);
    char* totals = static_cast<char*>(dscorer.mutable_data_ptr());
    for_each_chunk(sequences, p.width, 0, [&](const Chunk& chunk, char*) {
      const FlushDenormals flush;
      char* own = chunk.part >= 0 ? parts + chunk.part * scorer_values * size
                                  : totals + chunk.rows.sequence * scorer_values * size;
      k.backward(p, g, chunk.rows, own);
    });
    add_parts(sequences, parts, totals, scorer_values, p.x_dtype);
  }
  zero_dead_rows(dx, sequences.num_rows);
  return dscorer;
}

std::tuple<Tensor, Tensor> additive_pool_backward(const Tensor& dpooled, const Tensor& x, const Tensor& scorer,
                                                  const Tensor& cu_seqlens, const Tensor& pooled, const Tensor& softmax,
                                                  int64_t heads, bool full, double scale) {
  const Tensor dx = allocate_like(x);
  return {dx,
          additive_pool_backward_into(dx, false, dpooled, x, scorer, cu_seqlens, pooled, softmax, heads, full, scale)};
}

Tensor gate_rows(const Tensor& x, const Tensor& gate, const Tensor& cu_seqlens) {
  const char* op = "additive_attention";
  const Sequences sequences = split_sequences(cu_seqlens, x.size(0), op);
  const Tensor dense = as_dense(x);
  const Tensor y = allocate_like(x);
  const DType dtype = dtype_of(x, op, "query");
  const GateProblem g{x.size(1), dtype, dense.const_data_ptr(), nullptr, gate.const_data_ptr(), y.mutable_data_ptr()};
  const PoolKernels& k = table_for(dtype, kTables);
  for_each_chunk(sequences, g.width, 0, [&](const Chunk& chunk, char*) { k.gate(g, chunk.rows); });
  zero_dead_rows(y, sequences.num_rows);
  return y;
}

std::tuple<Tensor, Tensor> gate_rows_backward(const Tensor& dy, const Tensor& x, const Tensor& gate,
                                              const Tensor& cu_seqlens) {
  const char* op = "additive_attention_backward";
  const Sequences sequences = split_sequences(cu_seqlens, x.size(0), op);
  const Tensor dense = as_dense(x), dense_dy = as_dense(dy);
  const Tensor dx = allocate_like(x), dgate = allocate_zeros(gate.sizes(), gate.scalar_type());
  const DType dtype = dtype_of(x, op, "query");
  const GateProblem g{x.size(1),
                      dtype,
                      dense.const_data_ptr(),
                      dense_dy.const_data_ptr(),
                      gate.const_data_ptr(),
                      dx.mutable_data_ptr()};
  const size_t size = g.width * compute_size(dtype);
  char* parts = workspace<Slot::kCall>(sequences.num_parts * size);
  clear(parts, sequences.num_parts * size);
  char* totals = static_cast<char*>(dgate.mutable_data_ptr());
  const PoolKernels& k = table_for(dtype, kTables);
  for_each_chunk(sequences, g.width, 0, [&](const Chunk& chunk, char*) {
    k.gate_backward(g, chunk.rows, chunk.part >= 0 ? parts + chunk.part * size : totals + chunk.rows.sequence * size);
  });
  add_parts(sequences, parts, totals, g.width, dtype);
  zero_dead_rows(dx, sequences.num_rows);
  return {dx, dgate};
}

STABLE_TORCH_LIBRARY_IMPL(hbert_kernels, CPU, m) {
  m.impl("additive_pool", TORCH_BOX(&additive_pool));
  m.impl("additive_pool_backward", TORCH_BOX(&additive_pool_backward));
}

}  // namespace hbert
