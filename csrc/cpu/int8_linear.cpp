// Op int8_linear on the CPU: checks, allocation, division of the work among threads.
#include "int8_linear.h"

#include "linear_plan.h"
#include "ops.h"

namespace hbert {
namespace {

#define HBERT_TABLE(level) &level::kInt8Linear,
constexpr const Int8LinearKernels* kTables[] = {HBERT_FOR_LEVELS(HBERT_TABLE)};
#undef HBERT_TABLE

constexpr int64_t kMaxWidth = 1 << 17;  // sums of more products of int8 numbers may leave 32 bits

bool is_vector(const Tensor& t, int64_t count, ScalarType dtype) {
  return t.dim() == 1 && t.size(0) == count && t.scalar_type() == dtype;
}

void check_weight(const Tensor& weight, const Tensor& start, int64_t width, int64_t columns,
                  const Int8LinearKernels& k) {
  const char* op = "int8_linear";
  const int64_t panels = (columns + k.panel - 1) / k.panel, wide = k.group * k.steps;
  const int64_t steps = (width + wide - 1) / wide * k.steps;
  STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == ScalarType::Char && weight.is_contiguous() &&
                      start.dim() == 2 && start.scalar_type() == ScalarType::Int && start.is_contiguous(),
                  op, ": weight must be contiguous int8 [panels, steps, panel, group], start contiguous int32");
  STD_TORCH_CHECK(weight.size(2) == k.panel && weight.size(3) == k.group, op,
                  ": the weight is laid out for another instruction set level, pack it in this process");
  STD_TORCH_CHECK(
      weight.size(0) == panels && weight.size(1) == steps && start.size(0) == panels && start.size(1) == k.panel, op,
      ": the weight is not one of ", columns, " x ", width);
}

DType output_dtype(ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "int8_linear: out_dtype must be float32 or bfloat16");
  return dtype == ScalarType::Float ? DType::kFloat32 : DType::kBFloat16;
}

void run(const Int8LinearKernels& k, const Int8Linear& args, int64_t rows) {
  const LinearPlan plan(rows, args.width, args.columns, k.max_rows(args.width));
  const size_t packed_bytes = (plan.block_rows * k.row_bytes(args.width) + 63) / 64 * 64;
  const size_t sums_bytes = plan.sum_rows() * k.panel * sizeof(int32_t);
  torch::stable::parallel_for(0, plan.tasks(), plan.grain, [&](int64_t begin, int64_t end) {
    char* space = workspace<Slot::kTask>(packed_bytes + sums_bytes);
    int32_t* sums = reinterpret_cast<int32_t*>(space + packed_bytes);
    const void* packed = nullptr;
    plan.run(
        begin, end, [&](int64_t first, int64_t last) { packed = k.pack(args, first, last, space); },
        [&](int64_t first, int64_t last, int64_t column, int64_t columns) {
          k.multiply(args, first, last, column, columns, packed, sums);
        });
  });
}

}  // namespace

Tensor int8_linear(const Tensor& x, const Tensor& x_scale, const Tensor& weight, const Tensor& weight_start,
                   const Tensor& weight_scale, const std::optional<Tensor>& bias, const std::optional<Tensor>& other,
                   ScalarType out_dtype) {
  const char* op = "int8_linear";
  const Rows rows = check_rows(x, op);
  const int64_t columns = weight_scale.numel();
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Char, op, ": x must be int8");
  STD_TORCH_CHECK(rows.width <= kMaxWidth, op, ": rows are at most ", kMaxWidth, " wide, got ", rows.width);
  STD_TORCH_CHECK(is_vector(x_scale, rows.count, ScalarType::Float), op, ": x_scale must be float32 [", rows.count,
                  "]");
  STD_TORCH_CHECK(columns > 0 && is_vector(weight_scale, columns, ScalarType::Float), op,
                  ": weight_scale must be float32 [N]");
  const Int8LinearKernels& k = *kTables[level_index()];
  check_weight(weight, weight_start, rows.width, columns, k);
  Int8Linear args{};
  args.out_dtype = output_dtype(out_dtype);
  args.width = rows.width;
  args.columns = columns;
  const Tensor dense_x = as_dense(x), dense_scale = as_dense(x_scale), dense_weight_scale = as_dense(weight_scale);
  std::optional<Tensor> dense_other;
  if (other.has_value()) {
    check_shape(*other, rows.count, columns, op, "other");
    args.other_dtype = dtype_of(*other, op, "other");
    STD_TORCH_CHECK(args.other_dtype != DType::kFloat64, op, ": other must be float32 or bfloat16");
    dense_other = as_dense(*other);
    args.other = dense_other->const_data_ptr();
  }
  char* dense_bias = workspace<Slot::kCall>(columns * sizeof(float));
  copy_parameter(bias, 0, columns, DType::kFloat32, dense_bias, op);
  Tensor out = allocate({rows.count, columns}, out_dtype);
  args.x = static_cast<const int8_t*>(dense_x.const_data_ptr());
  args.x_scale = static_cast<const float*>(dense_scale.const_data_ptr());
  args.weight = static_cast<const int8_t*>(weight.const_data_ptr());
  args.start = static_cast<const int32_t*>(weight_start.const_data_ptr());
  args.weight_scale = static_cast<const float*>(dense_weight_scale.const_data_ptr());
  args.bias = reinterpret_cast<const float*>(dense_bias);
  args.out = out.mutable_data_ptr();
  run(k, args, rows.count);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(hbert_kernels, CPU, m) { m.impl("int8_linear", TORCH_BOX(&int8_linear)); }

}  // namespace hbert

// The layout of a weight that this process reads: panel, group, steps, offset and bounded_pairs (see int8_linear.h).
extern "C" __attribute__((visibility("default"))) int64_t hbert_int8_weight_layout(int32_t field) {
  const hbert::Int8LinearKernels& k = *hbert::kTables[hbert::level_index()];
  const int64_t fields[] = {k.panel, k.group, k.steps, k.offset, k.bounded_pairs};
  return fields[field];
}
