// Layer norms of independent rows on the CPU: layer_norm, add_layer_norm, activation_layer_norm, and their forms with int8 rows
// as output. Checks, allocation, loops.
#include <tuple>

#include "ops.h"

namespace hbert {
namespace {

#define HBERT_TABLE(level) &level::kRowNorm,
constexpr const RowNormKernels* kTables[] = {HBERT_FOR_CODE_LEVELS(HBERT_TABLE)};
#undef HBERT_TABLE

constexpr int64_t kMinBlockRows = 16;

// The parameters of a call, side by side in the call's workspace in the compute type.
struct Parameters {
  char *weight, *bias, *input_bias, *rest;
};

Parameters copy_parameters(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& input_bias, int64_t width, DType dtype, size_t more,
                           const char* op) {
  const size_t size = width * compute_size(dtype);
  char* memory = workspace<Slot::kCall>(3 * size + more);
  const Parameters out{memory, memory + size, memory + 2 * size, memory + 3 * size};
  copy_parameter(weight, 1, width, dtype, out.weight, op);
  copy_parameter(bias, 0, width, dtype, out.bias, op);
  copy_parameter(input_bias, 0, width, dtype, out.input_bias, op);
  return out;
}

void run_forward(RowNormForward args, Rows rows, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& input_bias, const char* op) {
  const Parameters parameters = copy_parameters(weight, bias, input_bias, rows.width, args.x_dtype, 0, op);
  args.width = rows.width;
  args.weight = parameters.weight;
  args.bias = parameters.bias;
  args.input_bias = parameters.input_bias;
  const RowNormKernels& k = table_for(args.x_dtype, kTables);
  torch::stable::parallel_for(0, rows.count, row_grain(rows.width), [&](int64_t begin, int64_t end) {
    k.forward(args, {begin, end, 0, 0, rows.count},
              workspace<Slot::kTask>(2 * rows.width * compute_size(args.x_dtype)));
  });
}

// A norm of x alone: plain, or of an activation.
std::tuple<Tensor, Tensor, Tensor> norm_of_rows(RowNormForward args, const Tensor& x,
                                                const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                                const std::optional<Tensor>& input_bias, const char* op) {
  const Rows rows = check_rows(x, op);
  const Tensor dense = as_dense(x);
  Tensor y = allocate({rows.count, rows.width}, x.scalar_type());
  args.x_dtype = dtype_of(x, op, "x");
  args.x = dense.const_data_ptr();
  args.y = y.mutable_data_ptr();
  const StatisticsTensors statistics = new_statistics(rows.count, args.x_dtype);
  put_statistics(args, statistics);
  run_forward(args, rows, weight, bias, input_bias, op);
  return {y, statistics.mean, statistics.rstd};
}

// The same with int8 rows as output, and y if it is to be kept.
std::tuple<Tensor, Tensor, Tensor> int8_rows(RowNormForward args, const Tensor& x, const std::optional<Tensor>& weight,
                                             const std::optional<Tensor>& bias, const std::optional<Tensor>& input_bias,
                                             bool keep, const char* op) {
  const Rows rows = check_rows(x, op);
  const Tensor dense = as_dense(x);
  args.x_dtype = dtype_of(x, op, "x");
  args.x = dense.const_data_ptr();
  const Int8Outputs out = new_int8_outputs(args, rows, x.scalar_type(), keep, op);
  run_forward(args, rows, weight, bias, input_bias, op);
  return {out.values, out.scale, out.y};
}

// The inputs of a residual sum, dense as long as this lives, and the sum.
struct ResidualSum {
  Rows rows;
  Tensor x, residual, total;

  ResidualSum(RowNormForward& args, const Tensor& branch, const Tensor& stream, double eps, const char* op)
      : rows(check_rows(branch, op)), x(as_dense(branch)), residual(as_dense(stream)) {
    check_shape(residual, rows.count, rows.width, op, "residual");
    args.source = RowSource::kResidual;
    args.eps = eps;
    args.x_dtype = dtype_of(x, op, "x");
    args.residual_dtype = dtype_of(residual, op, "residual");
    STD_TORCH_CHECK((args.x_dtype == DType::kFloat64) == (args.residual_dtype == DType::kFloat64), op,
                    ": float64 does not mix");
    const Tensor& wider = args.x_dtype == DType::kBFloat16 ? residual : x;
    total = allocate({rows.count, rows.width}, wider.scalar_type());
    args.x = x.const_data_ptr();
    args.residual = residual.const_data_ptr();
    args.total = total.mutable_data_ptr();
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const std::optional<Tensor>& weight,
                                              const std::optional<Tensor>& bias, double eps) {
  RowNormForward args{};
  args.source = RowSource::kPlain;
  args.eps = eps;
  return norm_of_rows(args, x, weight, bias, std::nullopt, "layer_norm");
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_int8(const Tensor& x, const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& bias, double eps, bool keep) {
  RowNormForward args{};
  args.source = RowSource::kPlain;
  args.eps = eps;
  return int8_rows(args, x, weight, bias, std::nullopt, keep, "layer_norm_int8");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual,
                                                          const std::optional<Tensor>& weight,
                                                          const std::optional<Tensor>& bias, double eps) {
  const char* op = "add_layer_norm";
  RowNormForward args{};
  const ResidualSum sum(args, x, residual, eps, op);
  Tensor y = allocate({sum.rows.count, sum.rows.width}, x.scalar_type());
  args.y = y.mutable_data_ptr();
  const StatisticsTensors statistics = new_statistics(sum.rows.count, args.x_dtype);
  put_statistics(args, statistics);
  run_forward(args, sum.rows, weight, bias, std::nullopt, op);
  return {y, sum.total, statistics.mean, statistics.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_int8(const Tensor& x, const Tensor& residual,
                                                               const std::optional<Tensor>& weight,
                                                               const std::optional<Tensor>& bias, double eps,
                                                               bool keep) {
  const char* op = "add_layer_norm_int8";
  RowNormForward args{};
  const ResidualSum sum(args, x, residual, eps, op);
  const Int8Outputs out = new_int8_outputs(args, sum.rows, x.scalar_type(), keep, op);
  run_forward(args, sum.rows, weight, bias, std::nullopt, op);
  return {out.values, out.scale, out.y, sum.total};
}

std::tuple<Tensor, Tensor, Tensor> activation_layer_norm(const Tensor& x, const std::optional<Tensor>& weight,
                                                         const std::optional<Tensor>& bias, double eps,
                                                         int64_t activation, const std::optional<Tensor>& input_bias) {
  const char* op = "activation_layer_norm";
  RowNormForward args{};
  args.source = RowSource::kActivation;
  args.activation = activation_of(activation, op);
  args.eps = eps;
  return norm_of_rows(args, x, weight, bias, input_bias, op);
}

std::tuple<Tensor, Tensor> activation_layer_norm_int8(const Tensor& x, const std::optional<Tensor>& weight,
                                                      const std::optional<Tensor>& bias, double eps, int64_t activation,
                                                      const std::optional<Tensor>& input_bias) {
  const char* op = "activation_layer_norm_int8";
  RowNormForward args{};
  args.source = RowSource::kActivation;
  args.activation = activation_of(activation, op);
  args.eps = eps;
  const auto [values, scale, _] = int8_rows(args, x, weight, bias, input_bias, false, op);
  return {values, scale};
}

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x, std::optional<int64_t> activation) {
  const char* op = "quantize_rows";
  RowNormForward args{};
  args.source = activation.has_value() ? RowSource::kActivation : RowSource::kPlain;
  if (activation.has_value()) args.activation = activation_of(*activation, op);
  args.skip_norm = true;
  const auto [values, scale, _] = int8_rows(args, x, std::nullopt, std::nullopt, std::nullopt, false, op);
  return {values, scale};
}

namespace {

// The inputs of a backward call, dense as long as this lives.
struct BackwardInputs {
  Tensor dy, x;
  std::optional<Tensor> dtotal;
};

struct ParameterGradients {
  Tensor weight, bias, input_bias;
};

void run_backward(RowNormBackward args, Rows rows, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& input_bias,
                  const ParameterGradients& gradients, const char* op) {
  const int64_t width = rows.width;
  const size_t size = compute_size(args.x_dtype);
  const int64_t per_block = std::max(kMinBlockRows, (rows.count + BlockSums::kMaxBlocks - 1) / BlockSums::kMaxBlocks);
  const int64_t blocks = std::max<int64_t>(1, (rows.count + per_block - 1) / per_block);
  const Parameters parameters = copy_parameters(weight, bias, input_bias, width, args.x_dtype,
                                                BlockSums::bytes(blocks, 3 * width, args.x_dtype), op);
  args.width = width;
  args.weight = parameters.weight;
  args.input_bias = parameters.input_bias;
  BlockSums sums(parameters.rest, blocks, 3 * width, args.x_dtype);
  const RowNormKernels& k = table_for(args.x_dtype, kTables);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    char* scratch = workspace<Slot::kTask>(2 * width * size);
    for (int64_t block = begin; block < end; ++block) {
      char* s = sums.start(block);
      const int64_t first = block * per_block;
      k.backward(args, {first, std::min(first + per_block, rows.count), 0, 0, rows.count},
                 {s, s + width * size, s + 2 * width * size}, scratch);
    }
  });
  sums.finish(0, gradients.weight);
  sums.finish(width, gradients.bias);
  sums.finish(2 * width, gradients.input_bias);
}

// Fills what all backward calls have in common; the returned tensors must outlive the call.
BackwardInputs prepare_backward(RowNormBackward& args, const Tensor& dy, const std::optional<Tensor>& dtotal,
                                const Tensor& x, const Tensor& mean, const Tensor& rstd, Rows rows, const char* op) {
  check_shape(dy, rows.count, rows.width, op, "dy");
  args.x_dtype = dtype_of(x, op, "x");
  args.dy_dtype = dtype_of(dy, op, "dy");
  check_statistics(mean, rstd, rows.count, args.x_dtype, op);
  BackwardInputs inputs{as_dense(dy), as_dense(x), std::nullopt};
  if (dtotal.has_value()) {
    check_shape(*dtotal, rows.count, rows.width, op, "dtotal");
    STD_TORCH_CHECK(dtotal->scalar_type() == x.scalar_type(), op, ": dtotal must have the dtype of x");
    inputs.dtotal = as_dense(*dtotal);
    args.dtotal = inputs.dtotal->const_data_ptr();
  }
  args.dy = inputs.dy.const_data_ptr();
  args.x = inputs.x.const_data_ptr();
  args.mean = mean.const_data_ptr();
  args.rstd = rstd.const_data_ptr();
  return inputs;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy, const std::optional<Tensor>& dtotal,
                                                       const Tensor& x, const Tensor& mean, const Tensor& rstd,
                                                       const std::optional<Tensor>& weight,
                                                       const std::optional<Tensor>& bias) {
  const char* op = "layer_norm_backward";
  const Rows rows = check_rows(x, op);
  RowNormBackward args{};
  args.source = RowSource::kPlain;
  const BackwardInputs inputs = prepare_backward(args, dy, dtotal, x, mean, rstd, rows, op);
  const bool mixed = args.x_dtype == DType::kFloat32 && args.dy_dtype == DType::kBFloat16;
  STD_TORCH_CHECK(args.dy_dtype == args.x_dtype || mixed, op,
                  ": dy must have the dtype of x, or be bfloat16 beside float32");
  Tensor dx = allocate({rows.count, rows.width}, x.scalar_type());
  args.dx = dx.mutable_data_ptr();
  const ParameterGradients gradients{new_gradient(x, weight), new_gradient(x, bias), new_gradient(x, std::nullopt)};
  run_backward(args, rows, weight, bias, std::nullopt, gradients, op);
  return {dx, gradients.weight, gradients.bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> activation_layer_norm_backward(
    const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, int64_t activation, const std::optional<Tensor>& input_bias) {
  const char* op = "activation_layer_norm_backward";
  const Rows rows = check_rows(x, op);
  RowNormBackward args{};
  args.source = RowSource::kActivation;
  args.activation = activation_of(activation, op);
  const BackwardInputs inputs = prepare_backward(args, dy, std::nullopt, x, mean, rstd, rows, op);
  STD_TORCH_CHECK(args.dy_dtype == args.x_dtype, op, ": dy must have the dtype of x");
  Tensor dx = allocate({rows.count, rows.width}, x.scalar_type());
  args.dx = dx.mutable_data_ptr();
  const ParameterGradients gradients{new_gradient(x, weight), new_gradient(x, bias), new_gradient(x, input_bias)};
  run_backward(args, rows, weight, bias, input_bias, gradients, op);
  return {dx, gradients.weight, gradients.bias, gradients.input_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hbert_kernels, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  m.impl("layer_norm_int8", TORCH_BOX(&layer_norm_int8));
  m.impl("add_layer_norm_int8", TORCH_BOX(&add_layer_norm_int8));
  m.impl("activation_layer_norm_int8", TORCH_BOX(&activation_layer_norm_int8));
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
  m.impl("activation_layer_norm", TORCH_BOX(&activation_layer_norm));
  m.impl("activation_layer_norm_backward", TORCH_BOX(&activation_layer_norm_backward));
}

}  // namespace hbert
