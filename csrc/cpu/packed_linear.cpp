// Op packed_linear on the CPU: checks, allocation, division of the work among threads.
#include "packed_linear.h"

#include "linear_plan.h"
#include "ops.h"

namespace hbert {
namespace {

struct Tables {
  const PackedLinearKernels *float32, *bfloat16;
};

#define HBERT_TABLE(level) {&level::kPackedLinear, &level::kPackedLinearBFloat16},
constexpr Tables kTables[] = {HBERT_FOR_CODE_LEVELS(HBERT_TABLE)};
#undef HBERT_TABLE

const PackedLinearKernels& kernels_of(ScalarType dtype) {
  const Tables& tables = kTables[level_index()];
  return dtype == ScalarType::BFloat16 ? *tables.bfloat16 : *tables.float32;
}

void check_weight(const Tensor& weight, ScalarType dtype, int64_t width, int64_t columns,
                  const PackedLinearKernels& k) {
  const char* op = "packed_linear";
  STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == dtype && weight.is_contiguous(), op,
                  ": weight must be contiguous [panels, steps, panel, group] in the dtype of x");
  STD_TORCH_CHECK(weight.size(2) == k.panel && weight.size(3) == k.group, op,
                  ": the weight is laid out for another instruction set level, pack it in this process");
  const int64_t panels = (columns + k.panel - 1) / k.panel, wide = k.group * k.steps;
  const int64_t steps = (width + wide - 1) / wide * k.steps;
  STD_TORCH_CHECK(columns > 0 && weight.size(0) == panels && weight.size(1) == steps, op, ": the weight is not one of ",
                  columns, " x ", width);
}

void run(const PackedLinearKernels& k, const PackedLinear& args, int64_t rows) {
  const LinearPlan plan(rows, args.width, args.columns, k.max_rows(args.width));
  const size_t rows_bytes = (plan.block_rows * k.row_bytes(args.width) + 63) / 64 * 64;
  const size_t sums_bytes = plan.sum_rows() * k.panel * sizeof(float);
  torch::stable::parallel_for(0, plan.tasks(), plan.grain, [&](int64_t begin, int64_t end) {
    char* space = workspace<Slot::kTask>(rows_bytes + sums_bytes);
    float* sums = reinterpret_cast<float*>(space + rows_bytes);
    const void* packed = nullptr;
    plan.run(
        begin, end, [&](int64_t first, int64_t last) { packed = k.pack(args, first, last, space); },
        [&](int64_t first, int64_t last, int64_t column, int64_t columns) {
          k.multiply(args, first, last, column, columns, packed, sums);
        });
  });
}

}  // namespace

Tensor packed_linear(const Tensor& x, const Tensor& weight, int64_t columns, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& other, std::optional<int64_t> activation) {
  const char* op = "packed_linear";
  const Rows rows = check_rows(x, op);
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op, ": x must be float32 or bfloat16");
  const PackedLinearKernels& k = kernels_of(dtype);
  check_weight(weight, dtype, rows.width, columns, k);
  PackedLinear args{};
  args.width = rows.width;
  args.columns = columns;
  args.activated = activation.has_value();
  if (activation.has_value()) args.activation = activation_of(*activation, op);
  std::optional<Tensor> dense_bias, dense_other;
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == columns && bias->scalar_type() == ScalarType::Float, op,
                    ": bias must be float32 [", columns, "]");
    dense_bias = as_dense(*bias);
    args.bias = static_cast<const float*>(dense_bias->const_data_ptr());
  }
  if (other.has_value()) {
    check_shape(*other, rows.count, columns, op, "other");
    STD_TORCH_CHECK(other->scalar_type() == dtype, op, ": other must have the dtype of x");
    dense_other = as_dense(*other);
    args.other = dense_other->const_data_ptr();
  }
  const Tensor dense_x = as_dense(x), out = allocate({rows.count, columns}, dtype);
  args.x = dense_x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.out = out.mutable_data_ptr();
  run(k, args, rows.count);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(hbert_kernels, CPU, m) { m.impl("packed_linear", TORCH_BOX(&packed_linear)); }

}  // namespace hbert

// The layout of a weight that this process reads: panel, group and steps (see packed_linear.h).
extern "C" __attribute__((visibility("default"))) int64_t hbert_packed_weight_layout(bool bfloat16, int32_t field) {
  using hbert::ScalarType;
  const hbert::PackedLinearKernels& k = hbert::kernels_of(bfloat16 ? ScalarType::BFloat16 : ScalarType::Float);
  const int64_t fields[] = {k.panel, k.group, k.steps};
  return fields[field];
}
