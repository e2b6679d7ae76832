// The ops of the row norms on CUDA: checks, allocation, launches.
#include <tuple>

#include "tensors.h"

namespace hbert {
namespace cuda {
namespace {

using Statistics = std::tuple<Tensor, Tensor, Tensor>;

void check_width(const Tensor& x, const char* op) {
  check_rows(x, op);
  STD_TORCH_CHECK(x.size(1) <= kMaxRowWidth, op, ": the CUDA kernels take rows of at most ", kMaxRowWidth,
                  " values, got ", x.size(1));
}

// y, mean and rstd; `args` has what the source needs.
Statistics run_forward(RowNormForward args, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                       double eps, const char* op) {
  const OnDevice device(x);
  const int64_t rows = x.size(0), width = x.size(1);
  check_count(weight, width, op, "weight");
  check_count(bias, width, op, "bias");
  const Tensor dense = as_dense(x);
  const OptionalTensor dense_weight = as_dense(weight), dense_bias = as_dense(bias);
  const Tensor y = allocate(x, {rows, width}, x.scalar_type());
  const Tensor mean = allocate(x, {rows}, ScalarType::Float), rstd = allocate(x, {rows}, ScalarType::Float);
  args.packing.rows = rows;
  args.width = static_cast<int32_t>(width);
  args.eps = static_cast<float>(eps);
  args.dtype = dtype_of(x, op, "x");
  args.x = dense.const_data_ptr();
  args.weight = values_of(dense_weight, op, "weight");
  args.bias = values_of(dense_bias, op, "bias");
  args.y = y.mutable_data_ptr();
  args.mean = mutable_floats_of(mean);
  args.rstd = mutable_floats_of(rstd);
  check_launch(hbert_cuda_row_norm_forward(&args, device.stream()), op);
  return {y, mean, rstd};
}

Statistics layer_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  const char* op = "layer_norm";
  check_width(x, op);
  RowNormForward args{};
  args.source = RowSource::kPlain;
  return run_forward(args, x, weight, bias, eps, op);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual,
                                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                                          double eps) {
  const char* op = "add_layer_norm";
  check_width(x, op);
  check_same_shape(residual, x, op, "residual");
  const bool same = x.scalar_type() == residual.scalar_type();
  const Tensor total = allocate(x, x.sizes(), same ? x.scalar_type() : ScalarType::Float), dense = as_dense(residual);
  RowNormForward args{};
  args.source = RowSource::kResidual;
  args.residual = values_of(dense, op, "residual");
  args.total = mutable_values_of(total, op, "total");
  const auto [y, mean, rstd] = run_forward(args, x, weight, bias, eps, op);
  return {y, total, mean, rstd};
}

Activation activation_of(int64_t code, const char* op) {
  STD_TORCH_CHECK(code >= 0 && code <= 2, op, ": activation must be 0 (gelu), 1 (gelu_tanh) or 2 (relu), got ", code);
  return static_cast<Activation>(code);
}

Statistics activation_layer_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                 int64_t activation, const OptionalTensor& input_bias) {
  const char* op = "activation_layer_norm";
  check_width(x, op);
  check_count(input_bias, x.size(1), op, "input_bias");
  const OptionalTensor dense = as_dense(input_bias);
  RowNormForward args{};
  args.source = RowSource::kActivation;
  args.activation = activation_of(activation, op);
  args.input_bias = values_of(dense, op, "input_bias");
  return run_forward(args, x, weight, bias, eps, op);
}

void check_gate(const Tensor& gate, const Tensor& cu_seqlens, const Tensor& x, const char* op) {
  STD_TORCH_CHECK(gate.dim() == 2 && gate.size(0) == cu_seqlens.size(0) - 1 && gate.size(1) == x.size(1), op,
                  ": gate must be [B, width]");
}

Statistics gated_layer_norm(const Tensor& x, const Tensor& gate, const Tensor& cu_seqlens, const OptionalTensor& weight,
                            const OptionalTensor& bias, double eps) {
  const char* op = "gated_layer_norm";
  check_width(x, op);
  check_gate(gate, cu_seqlens, x, op);
  const Tensor dense_gate = as_dense(gate), bounds = as_dense(cu_seqlens);
  RowNormForward args{};
  args.source = RowSource::kGated;
  args.packing = packing_of(bounds, x, op);
  args.gate = floats_of(dense_gate, op, "gate");
  return run_forward(args, x, weight, bias, eps, op);
}

struct Gradients {
  Tensor x, weight, bias, source;
};

// `args` has what the source needs, `source` the tensor whose gradient comes through it.
Gradients run_backward(RowNormBackward args, const Tensor& dy, const OptionalTensor& dtotal, const Tensor& x,
                       const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& source, const char* op) {
  const OnDevice device(x);
  const int64_t rows = x.size(0), width = x.size(1);
  check_same_shape(dy, x, op, "dy");
  check_count(mean, rows, op, "mean");
  check_count(rstd, rows, op, "rstd");
  check_count(weight, width, op, "weight");
  check_count(bias, width, op, "bias");
  if (dtotal.has_value()) {
    check_same_shape(*dtotal, x, op, "dtotal");
    STD_TORCH_CHECK(dtotal->scalar_type() == x.scalar_type(), op, ": dtotal must have the dtype of x");
  }
  const Tensor dense_dy = as_dense(dy), dense = as_dense(x), dense_mean = as_dense(mean), dense_rstd = as_dense(rstd);
  const OptionalTensor dense_dtotal = as_dense(dtotal), dense_weight = as_dense(weight);
  const Gradients gradients{allocate(x, x.sizes(), x.scalar_type()), gradient_like(x, weight), gradient_like(x, bias),
                            gradient_like(x, source)};
  args.packing.rows = rows;
  args.width = static_cast<int32_t>(width);
  args.dtype = dtype_of(x, op, "x");
  args.dy = values_of(dense_dy, op, "dy");
  args.dtotal = dense_dtotal.has_value() ? dense_dtotal->const_data_ptr() : nullptr;
  args.x = dense.const_data_ptr();
  args.mean = floats_of(dense_mean, op, "mean");
  args.rstd = floats_of(dense_rstd, op, "rstd");
  args.weight = values_of(dense_weight, op, "weight");
  args.dx = gradients.x.mutable_data_ptr();
  args.dweight = mutable_values_of(gradients.weight, op, "weight");
  args.dbias = mutable_values_of(gradients.bias, op, "bias");
  args.dsource = mutable_values_of(gradients.source, op, "a parameter");
  const Tensor partial = allocate(x, {hbert_cuda_row_norm_partial(&args)}, ScalarType::Float);
  args.partial = mutable_floats_of(partial);
  check_launch(hbert_cuda_row_norm_backward(&args, device.stream()), op);
  return gradients;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy, const OptionalTensor& dtotal, const Tensor& x,
                                                       const Tensor& mean, const Tensor& rstd,
                                                       const OptionalTensor& weight, const OptionalTensor& bias) {
  const char* op = "layer_norm_backward";
  check_width(x, op);
  RowNormBackward args{};
  args.source = RowSource::kPlain;
  const Gradients d = run_backward(args, dy, dtotal, x, mean, rstd, weight, bias, std::nullopt, op);
  return {d.x, d.weight, d.bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> activation_layer_norm_backward(
    const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight,
    const OptionalTensor& bias, int64_t activation, const OptionalTensor& input_bias) {
  const char* op = "activation_layer_norm_backward";
  check_width(x, op);
  check_count(input_bias, x.size(1), op, "input_bias");
  const OptionalTensor dense = as_dense(input_bias);
  RowNormBackward args{};
  args.source = RowSource::kActivation;
  args.activation = activation_of(activation, op);
  args.input_bias = values_of(dense, op, "input_bias");
  const Gradients d = run_backward(args, dy, std::nullopt, x, mean, rstd, weight, bias, input_bias, op);
  return {d.x, d.weight, d.bias, d.source};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_layer_norm_backward(const Tensor& dy, const Tensor& x,
                                                                     const Tensor& gate, const Tensor& cu_seqlens,
                                                                     const Tensor& mean, const Tensor& rstd,
                                                                     const OptionalTensor& weight,
                                                                     const OptionalTensor& bias) {
  const char* op = "gated_layer_norm_backward";
  check_width(x, op);
  check_gate(gate, cu_seqlens, x, op);
  const Tensor dense_gate = as_dense(gate), bounds = as_dense(cu_seqlens);
  RowNormBackward args{};
  args.source = RowSource::kGated;
  args.packing = packing_of(bounds, x, op);
  args.gate = floats_of(dense_gate, op, "gate");
  const Gradients d = run_backward(args, dy, std::nullopt, x, mean, rstd, weight, bias, gate, op);
  return {d.x, d.source, d.weight, d.bias};
}

}  // namespace

HBERT_IMPLEMENTATIONS(m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
  m.impl("activation_layer_norm", TORCH_BOX(&activation_layer_norm));
  m.impl("activation_layer_norm_backward", TORCH_BOX(&activation_layer_norm_backward));
  m.impl("gated_layer_norm", TORCH_BOX(&gated_layer_norm));
  m.impl("gated_layer_norm_backward", TORCH_BOX(&gated_layer_norm_backward));
}

}  // namespace cuda
}  // namespace hbert
