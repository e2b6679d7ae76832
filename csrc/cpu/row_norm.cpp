// Ops layer_norm, add_layer_norm and layer_norm_backward on the CPU: checks, allocation, parallel loop.
#include <algorithm>
#include <cstring>
#include <tuple>

#include "row_norm.h"
#include "tensors.h"

namespace hbert {
namespace {

// Weight gradients are summed over fixed blocks of rows, then over the blocks in order: the same bits for any thread count.
constexpr int64_t kMaxBlocks = 64;
constexpr int64_t kMinBlockRows = 16;

#define HBERT_TABLE(level) &level::kRowNorm,
constexpr const RowNormKernels* kTables[] = {HBERT_FOR_LEVELS(HBERT_TABLE)};
#undef HBERT_TABLE

struct Rows {
  int64_t count, width;
};

Rows check_rows(const Tensor& x, const char* op) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0, op, ": x must be [rows, width]");
  return {x.size(0), x.size(1)};
}

void check_same_shape(const Tensor& t, Rows rows, const char* op, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows.count && t.size(1) == rows.width, op, ": ", name,
                  " must have the shape of x");
}

template <class R>
void copy_parameter(const std::optional<Tensor>& parameter, R fallback, int64_t width, R* out, const char* op) {
  if (!parameter.has_value()) {
    std::fill(out, out + width, fallback);
    return;
  }
  STD_TORCH_CHECK(parameter->dim() == 1 && parameter->size(0) == width, op, ": weight and bias must be [width]");
  const Tensor dense = torch::stable::contiguous(*parameter);
  const DType dtype = dtype_of(dense, op, "weight or bias");
  STD_TORCH_CHECK((dtype == DType::kFloat64) == (sizeof(R) == sizeof(double)), op, ": float64 does not mix");
  if (dtype == DType::kBFloat16) {
    const uint16_t* bits = static_cast<const uint16_t*>(dense.const_data_ptr());
    for (int64_t i = 0; i < width; ++i) {
      const uint32_t wide = static_cast<uint32_t>(bits[i]) << 16;
      float value;
      std::memcpy(&value, &wide, sizeof(value));
      out[i] = static_cast<R>(value);
    }
  } else {
    std::memcpy(out, dense.const_data_ptr(), width * sizeof(R));
  }
}

// Weight (default 1) and bias (default 0) in the compute type, side by side in `out`.
void copy_affine(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, DType dtype, int64_t width,
                 void* out, const char* op) {
  if (dtype == DType::kFloat64) {
    copy_parameter<double>(weight, 1, width, static_cast<double*>(out), op);
    copy_parameter<double>(bias, 0, width, static_cast<double*>(out) + width, op);
  } else {
    copy_parameter<float>(weight, 1, width, static_cast<float*>(out), op);
    copy_parameter<float>(bias, 0, width, static_cast<float*>(out) + width, op);
  }
}

struct Statistics {
  Tensor mean, rstd;
};

Statistics new_statistics(const Tensor& x, Rows rows, DType dtype) {
  return {torch::stable::new_empty(x, {rows.count}, compute_type(dtype)),
          torch::stable::new_empty(x, {rows.count}, compute_type(dtype))};
}

void run_forward(LayerNormForward args, Rows rows, const std::optional<Tensor>& weight,
                 const std::optional<Tensor>& bias, const Statistics& statistics, const char* op) {
  const size_t size = compute_size(args.x_dtype);
  char* affine = static_cast<char*>(workspace(2 * rows.width * size));
  copy_affine(weight, bias, args.x_dtype, rows.width, affine, op);
  args.width = rows.width;
  args.weight = affine;
  args.bias = affine + rows.width * size;
  args.mean = statistics.mean.mutable_data_ptr();
  args.rstd = statistics.rstd.mutable_data_ptr();
  const RowNormKernels& k = table_for(args.x_dtype, kTables);
  torch::stable::parallel_for(0, rows.count, row_grain(rows.width),
                              [&](int64_t begin, int64_t end) { k.layer_norm_forward(args, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const std::optional<Tensor>& weight,
                                              const std::optional<Tensor>& bias, double eps) {
  const char* op = "layer_norm";
  const Rows rows = check_rows(x, op);
  const Tensor dense = torch::stable::contiguous(x);
  Tensor y = torch::stable::new_empty(x, {rows.count, rows.width});
  LayerNormForward args{};
  args.eps = eps;
  args.x_dtype = dtype_of(x, op, "x");
  args.x = dense.const_data_ptr();
  args.y = y.mutable_data_ptr();
  const Statistics statistics = new_statistics(x, rows, args.x_dtype);
  run_forward(args, rows, weight, bias, statistics, op);
  return {y, statistics.mean, statistics.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual,
                                                          const std::optional<Tensor>& weight,
                                                          const std::optional<Tensor>& bias, double eps) {
  const char* op = "add_layer_norm";
  const Rows rows = check_rows(x, op);
  check_same_shape(residual, rows, op, "residual");
  const Tensor dense_x = torch::stable::contiguous(x), dense_residual = torch::stable::contiguous(residual);
  LayerNormForward args{};
  args.eps = eps;
  args.x_dtype = dtype_of(x, op, "x");
  args.residual_dtype = dtype_of(residual, op, "residual");
  STD_TORCH_CHECK((args.x_dtype == DType::kFloat64) == (args.residual_dtype == DType::kFloat64), op,
                  ": float64 does not mix");
  const Tensor& wider = args.x_dtype == DType::kBFloat16 ? residual : x;
  args.total_dtype = dtype_of(wider, op, "x");
  Tensor y = torch::stable::new_empty(x, {rows.count, rows.width});
  Tensor total = torch::stable::new_empty(wider, {rows.count, rows.width});
  args.x = dense_x.const_data_ptr();
  args.residual = dense_residual.const_data_ptr();
  args.total = total.mutable_data_ptr();
  args.y = y.mutable_data_ptr();
  const Statistics statistics = new_statistics(x, rows, args.x_dtype);
  run_forward(args, rows, weight, bias, statistics, op);
  return {y, total, statistics.mean, statistics.rstd};
}

// out = the sum of `blocks` rows of partial sums, in order.
template <class R>
void sum_blocks(const R* partial, int64_t blocks, int64_t stride, int64_t width, Tensor& out) {
  R* sums = const_cast<R*>(partial);
  for (int64_t block = 1; block < blocks; ++block)
    for (int64_t i = 0; i < width; ++i) sums[i] += partial[block * stride + i];
  const Tensor source = torch::stable::from_blob(sums, {width}, {1}, out.device(),
                                                 sizeof(R) == sizeof(double) ? ScalarType::Double : ScalarType::Float);
  torch::stable::copy_(out, source);
}

void sum_gradient(const std::optional<Tensor>& parameter, const char* partial, int64_t blocks, int64_t stride,
                  int64_t width, DType dtype, Tensor& out) {
  if (!parameter.has_value()) return;
  if (dtype == DType::kFloat64)
    sum_blocks(reinterpret_cast<const double*>(partial), blocks, stride, width, out);
  else
    sum_blocks(reinterpret_cast<const float*>(partial), blocks, stride, width, out);
}

Tensor new_gradient(const Tensor& x, const std::optional<Tensor>& parameter) {
  return parameter.has_value() ? torch::stable::new_empty(*parameter, {parameter->size(0)})
                               : torch::stable::new_empty(x, {0});
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy, const std::optional<Tensor>& dtotal,
                                                       const Tensor& x, const Tensor& mean, const Tensor& rstd,
                                                       const std::optional<Tensor>& weight,
                                                       const std::optional<Tensor>& bias) {
  const char* op = "layer_norm_backward";
  const Rows rows = check_rows(x, op);
  check_same_shape(dy, rows, op, "dy");
  const Tensor dense_dy = torch::stable::contiguous(dy), dense_x = torch::stable::contiguous(x);
  std::optional<Tensor> dense_dtotal;
  LayerNormBackward args{};
  args.width = rows.width;
  args.x_dtype = dtype_of(x, op, "x");
  args.dy_dtype = dtype_of(dy, op, "dy");
  const bool mixed = args.x_dtype == DType::kFloat32 && args.dy_dtype == DType::kBFloat16;
  STD_TORCH_CHECK(args.dy_dtype == args.x_dtype || mixed, op, ": dy must have the dtype of x, or be bfloat16 beside float32");
  for (const Tensor* statistic : {&mean, &rstd})
    STD_TORCH_CHECK(statistic->dim() == 1 && statistic->size(0) == rows.count && statistic->is_contiguous() &&
                        statistic->scalar_type() == compute_type(args.x_dtype),
                    op, ": mean and rstd must be contiguous [rows] in the compute dtype");
  if (dtotal.has_value()) {
    check_same_shape(*dtotal, rows, op, "dtotal");
    STD_TORCH_CHECK(dtotal->scalar_type() == x.scalar_type(), op, ": dtotal must have the dtype of x");
    dense_dtotal = torch::stable::contiguous(*dtotal);
    args.dtotal = dense_dtotal->const_data_ptr();
  }
  Tensor dx = torch::stable::new_empty(x, {rows.count, rows.width});
  Tensor dweight = new_gradient(x, weight), dbias = new_gradient(x, bias);

  const size_t size = compute_size(args.x_dtype);
  const int64_t block_rows = std::max(kMinBlockRows, (rows.count + kMaxBlocks - 1) / kMaxBlocks);
  const int64_t blocks = std::max<int64_t>(1, (rows.count + block_rows - 1) / block_rows);
  char* affine = static_cast<char*>(workspace((2 + 2 * blocks) * rows.width * size));
  char* partial = affine + 2 * rows.width * size;
  copy_affine(weight, bias, args.x_dtype, rows.width, affine, op);
  args.dy = dense_dy.const_data_ptr();
  args.x = dense_x.const_data_ptr();
  args.mean = mean.const_data_ptr();
  args.rstd = rstd.const_data_ptr();
  args.weight = affine;
  args.dx = dx.mutable_data_ptr();
  const RowNormKernels& k = table_for(args.x_dtype, kTables);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      char* sums = partial + block * 2 * rows.width * size;
      const int64_t first = block * block_rows;
      k.layer_norm_backward(args, first, std::min(first + block_rows, rows.count), sums, sums + rows.width * size);
    }
  });
  sum_gradient(weight, partial, blocks, 2 * rows.width, rows.width, args.x_dtype, dweight);
  sum_gradient(bias, partial + rows.width * size, blocks, 2 * rows.width, rows.width, args.x_dtype, dbias);
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hbert_kernels, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace hbert
