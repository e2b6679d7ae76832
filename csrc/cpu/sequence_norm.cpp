// Layer norms that know the sequences of packed tokens, on the CPU: gated_layer_norm and conv_layer_norm.
#include "ops.h"

namespace hbert {
namespace {

#define HBERT_TABLE(level) &level::kRowNorm,
constexpr const RowNormKernels* kRowTables[] = {HBERT_FOR_CODE_LEVELS(HBERT_TABLE)};
#undef HBERT_TABLE
#define HBERT_TABLE(level) &level::kConvNorm,
constexpr const ConvNormKernels* kConvTables[] = {HBERT_FOR_CODE_LEVELS(HBERT_TABLE)};
#undef HBERT_TABLE

void zero_dead_outputs(const Tensor& y, const StatisticsTensors& statistics, int64_t alive) {
  zero_dead_rows(y, alive);
  zero_dead_rows(statistics.mean, alive);
  zero_dead_rows(statistics.rstd, alive);
}

void check_gate(const Tensor& gate, const Sequences& sequences, Rows rows, DType dtype, const char* op) {
  check_shape(gate, sequences.count, rows.width, op, "gate");
  STD_TORCH_CHECK(gate.scalar_type() == compute_type(dtype), op, ": gate must have the compute dtype");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> gated_layer_norm(const Tensor& x, const Tensor& gate, const Tensor& cu_seqlens,
                                                    const std::optional<Tensor>& weight,
                                                    const std::optional<Tensor>& bias, double eps) {
  const char* op = "gated_layer_norm";
  const Rows rows = check_rows(x, op);
  const Sequences sequences = split_sequences(cu_seqlens, rows.count, op);
  const Tensor dense = as_dense(x), dense_gate = as_dense(gate);
  RowNormForward args{};
  args.source = RowSource::kGated;
  args.width = rows.width;
  args.eps = eps;
  args.x_dtype = dtype_of(x, op, "x");
  check_gate(gate, sequences, rows, args.x_dtype, op);
  Tensor y = allocate({rows.count, rows.width}, x.scalar_type());
  const StatisticsTensors statistics = new_statistics(rows.count, args.x_dtype);
  const size_t size = rows.width * compute_size(args.x_dtype);
  char* parameters = workspace<Slot::kCall>(2 * size);
  copy_parameter(weight, 1, rows.width, args.x_dtype, parameters, op);
  copy_parameter(bias, 0, rows.width, args.x_dtype, parameters + size, op);
  args.x = dense.const_data_ptr();
  args.gate = dense_gate.const_data_ptr();
  args.weight = parameters;
  args.bias = parameters + size;
  args.y = y.mutable_data_ptr();
  put_statistics(args, statistics);
  const RowNormKernels& k = table_for(args.x_dtype, kRowTables);
  for_each_chunk(sequences, rows.width, 2 * size,
                 [&](const Chunk& chunk, char* scratch) { k.forward(args, chunk.rows, scratch); });
  zero_dead_outputs(y, statistics, sequences.num_rows);
  return {y, statistics.mean, statistics.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_layer_norm_backward(const Tensor& dy, const Tensor& x,
                                                                     const Tensor& gate, const Tensor& cu_seqlens,
                                                                     const Tensor& mean, const Tensor& rstd,
                                                                     const std::optional<Tensor>& weight,
                                                                     const std::optional<Tensor>& bias) {
  const char* op = "gated_layer_norm_backward";
  const Rows rows = check_rows(x, op);
  const Sequences sequences = split_sequences(cu_seqlens, rows.count, op);
  check_shape(dy, rows.count, rows.width, op, "dy");
  const Tensor dense_dy = as_dense(dy), dense = as_dense(x), dense_gate = as_dense(gate);
  RowNormBackward args{};
  args.source = RowSource::kGated;
  args.width = rows.width;
  args.x_dtype = args.dy_dtype = dtype_of(x, op, "x");
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), op, ": dy must have the dtype of x");
  check_gate(gate, sequences, rows, args.x_dtype, op);
  check_statistics(mean, rstd, rows.count, args.x_dtype, op);
  Tensor dx = allocate({rows.count, rows.width}, x.scalar_type());
  Tensor dgate = allocate_zeros({sequences.count, rows.width}, gate.scalar_type());
  Tensor dweight = new_gradient(x, weight), dbias = new_gradient(x, bias);
  const size_t size = rows.width * compute_size(args.x_dtype);
  const ChunkBlocks blocks(sequences);
  const size_t parts_bytes = sequences.num_parts * size;
  char* memory =
      workspace<Slot::kCall>(size + parts_bytes + BlockSums::bytes(blocks.count, 2 * rows.width, args.x_dtype));
  char* parts = memory + size;
  copy_parameter(weight, 1, rows.width, args.x_dtype, memory, op);
  clear(parts, parts_bytes);
  BlockSums sums(parts + parts_bytes, blocks.count, 2 * rows.width, args.x_dtype);
  args.dy = dense_dy.const_data_ptr();
  args.x = dense.const_data_ptr();
  args.gate = dense_gate.const_data_ptr();
  args.mean = mean.const_data_ptr();
  args.rstd = rstd.const_data_ptr();
  args.weight = memory;
  args.dx = dx.mutable_data_ptr();
  char* gates = static_cast<char*>(dgate.mutable_data_ptr());
  const RowNormKernels& k = table_for(args.x_dtype, kRowTables);
  for_each_block(sequences, blocks, sums, 2 * size, [&](const Chunk& chunk, char* s, char* scratch) {
    char* dsource = chunk.part >= 0 ? parts + chunk.part * size : gates + chunk.rows.sequence * size;
    k.backward(args, chunk.rows, {s, s + size, dsource}, scratch);
  });
  add_parts(sequences, parts, gates, rows.width, args.x_dtype);
  sums.finish(0, dweight);
  sums.finish(rows.width, dbias);
  zero_dead_rows(dx, sequences.num_rows);
  return {dx, dgate, dweight, dbias};
}

namespace {

// Taps in the compute type, with the residual as one more unit in the middle one.
void copy_conv_weight(const Tensor& conv_weight, int64_t width, DType dtype, char* out, const char* op) {
  STD_TORCH_CHECK(conv_weight.dim() == 2 && conv_weight.size(0) % 2 == 1 && conv_weight.size(1) == width, op,
                  ": conv_weight must be [taps, width] with an odd number of taps");
  copy_parameter(conv_weight, 0, conv_weight.numel(), dtype, out, op);
  auto add_residual = [&](auto* taps) {
    for (int64_t i = 0; i < width; ++i) taps[conv_weight.size(0) / 2 * width + i] += 1;
  };
  dtype == DType::kFloat64 ? add_residual(reinterpret_cast<double*>(out)) : add_residual(reinterpret_cast<float*>(out));
}

// weight | bias | taps in the call's workspace, and room for `more` bytes.
char* copy_conv_parameters(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                           const Tensor& conv_weight, int64_t width, DType dtype, size_t more, const char* op) {
  const size_t size = width * compute_size(dtype);
  char* memory = workspace<Slot::kCall>((2 + conv_weight.size(0)) * size + more);
  copy_parameter(weight, 1, width, dtype, memory, op);
  copy_parameter(bias, 0, width, dtype, memory + size, op);
  copy_conv_weight(conv_weight, width, dtype, memory + 2 * size, op);
  return memory;
}

// A conv norm whose outputs are set in the arguments.
void run_conv_forward(ConvNormForward args, const Tensor& x, Rows rows, const Sequences& sequences,
                      const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const Tensor& conv_weight,
                      const char* op) {
  const Tensor dense = as_dense(x);
  const size_t size = rows.width * compute_size(args.x_dtype);
  char* parameters = copy_conv_parameters(weight, bias, conv_weight, rows.width, args.x_dtype, 0, op);
  args.width = rows.width;
  args.taps = conv_weight.size(0);
  args.x = dense.const_data_ptr();
  args.weight = parameters;
  args.bias = parameters + size;
  args.conv_weight = parameters + 2 * size;
  const ConvNormKernels& k = table_for(args.x_dtype, kConvTables);
  for_each_chunk(sequences, rows.width, (args.taps + 1) * size,
                 [&](const Chunk& chunk, char* scratch) { k.forward(args, chunk.rows, scratch); });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> conv_layer_norm(const Tensor& x, const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& bias, const Tensor& conv_weight,
                                                   const Tensor& cu_seqlens, double eps) {
  const char* op = "conv_layer_norm";
  const Rows rows = check_rows(x, op);
  const Sequences sequences = split_sequences(cu_seqlens, rows.count, op);
  ConvNormForward args{};
  args.eps = eps;
  args.x_dtype = dtype_of(x, op, "x");
  Tensor y = allocate({rows.count, rows.width}, x.scalar_type());
  args.y = y.mutable_data_ptr();
  const StatisticsTensors statistics = new_statistics(rows.count, args.x_dtype);
  put_statistics(args, statistics);
  run_conv_forward(args, x, rows, sequences, weight, bias, conv_weight, op);
  zero_dead_outputs(y, statistics, sequences.num_rows);
  return {y, statistics.mean, statistics.rstd};
}

std::tuple<Tensor, Tensor, Tensor> conv_layer_norm_int8(const Tensor& x, const std::optional<Tensor>& weight,
                                                        const std::optional<Tensor>& bias, const Tensor& conv_weight,
                                                        const Tensor& cu_seqlens, double eps, bool keep) {
  const char* op = "conv_layer_norm_int8";
  const Rows rows = check_rows(x, op);
  const Sequences sequences = split_sequences(cu_seqlens, rows.count, op);
  ConvNormForward args{};
  args.eps = eps;
  args.x_dtype = dtype_of(x, op, "x");
  const Int8Outputs out = new_int8_outputs(args, rows, x.scalar_type(), keep, op);
  run_conv_forward(args, x, rows, sequences, weight, bias, conv_weight, op);
  zero_dead_rows(out.values, sequences.num_rows);
  zero_dead_rows(out.scale, sequences.num_rows);
  if (keep) zero_dead_rows(out.y, sequences.num_rows);
  return {out.values, out.scale, out.y};
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_layer_norm_backward(
    const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const Tensor& conv_weight, const Tensor& cu_seqlens) {
  const char* op = "conv_layer_norm_backward";
  const Rows rows = check_rows(x, op);
  const Sequences sequences = split_sequences(cu_seqlens, rows.count, op);
  check_shape(dy, rows.count, rows.width, op, "dy");
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), op, ": dy must have the dtype of x");
  const Tensor dense_dy = as_dense(dy), dense = as_dense(x);
  ConvNormBackward args{};
  args.width = rows.width;
  args.taps = conv_weight.size(0);
  args.x_dtype = dtype_of(x, op, "x");
  check_statistics(mean, rstd, rows.count, args.x_dtype, op);
  Tensor dx = allocate({rows.count, rows.width}, x.scalar_type());
  Tensor dweight = new_gradient(x, weight), dbias = new_gradient(x, bias), dconv = new_gradient(x, conv_weight);
  const size_t size = rows.width * compute_size(args.x_dtype);
  const ChunkBlocks blocks(sequences);
  const int64_t values = (2 + args.taps) * rows.width;
  char* parameters = copy_conv_parameters(weight, bias, conv_weight, rows.width, args.x_dtype,
                                          BlockSums::bytes(blocks.count, values, args.x_dtype), op);
  BlockSums sums(parameters + values * compute_size(args.x_dtype), blocks.count, values, args.x_dtype);
  args.dy = dense_dy.const_data_ptr();
  args.x = dense.const_data_ptr();
  args.mean = mean.const_data_ptr();
  args.rstd = rstd.const_data_ptr();
  args.weight = parameters;
  args.bias = parameters + size;
  args.conv_weight = parameters + 2 * size;
  args.dx = dx.mutable_data_ptr();
  const ConvNormKernels& k = table_for(args.x_dtype, kConvTables);
  for_each_block(sequences, blocks, sums, size, [&](const Chunk& chunk, char* s, char* scratch) {
    k.backward(args, chunk.rows, {s, s + size, s + 2 * size}, scratch);
  });
  sums.finish(0, dweight);
  sums.finish(rows.width, dbias);
  sums.finish(2 * rows.width, dconv);
  zero_dead_rows(dx, sequences.num_rows);
  return {dx, dweight, dbias, dconv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hbert_kernels, CPU, m) {
  m.impl("gated_layer_norm", TORCH_BOX(&gated_layer_norm));
  m.impl("gated_layer_norm_backward", TORCH_BOX(&gated_layer_norm_backward));
  m.impl("conv_layer_norm", TORCH_BOX(&conv_layer_norm));
  m.impl("conv_layer_norm_int8", TORCH_BOX(&conv_layer_norm_int8));
  m.impl("conv_layer_norm_backward", TORCH_BOX(&conv_layer_norm_backward));
}

}  // namespace hbert
