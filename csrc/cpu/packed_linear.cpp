// Op packed_linear on the CPU: checks, allocation, division of the work among threads.
#include "packed_linear.h"

#include "linear_plan.h"
#include "norm_common.h"

namespace hbert {
namespace {

#define HBERT_TABLE(level) &level::kPackedLinear,
constexpr const PackedLinearKernels* kTables[] = {HBERT_FOR_LEVELS(HBERT_TABLE)};
#undef HBERT_TABLE

constexpr int64_t kMaxRows = 96;  // of a task

const float* floats_of(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

void check_weight(const Tensor& weight, int64_t width, int64_t columns, const PackedLinearKernels& k) {
  const char* op = "packed_linear";
  STD_TORCH_CHECK(weight.dim() == 3 && weight.scalar_type() == ScalarType::Float && weight.is_contiguous(), op,
                  ": weight must be contiguous float32 [panels, K, panel]");
  STD_TORCH_CHECK(weight.size(2) == k.panel, op,
                  ": the weight is laid out for another instruction set level, pack it in this process");
  STD_TORCH_CHECK(columns > 0 && weight.size(0) == (columns + k.panel - 1) / k.panel && weight.size(1) == width, op,
                  ": the weight is not one of ", columns, " x ", width);
}

void run(const PackedLinearKernels& k, const PackedLinear& args, int64_t rows) {
  const LinearPlan plan(rows, args.width, args.columns, kMaxRows);
  const size_t packed = plan.block_rows * args.width, sums = plan.block_rows * k.panel;
  torch::stable::parallel_for(0, plan.tasks(), plan.grain, [&](int64_t begin, int64_t end) {
    float* scratch = reinterpret_cast<float*>(workspace<Slot::kTask>((packed + sums) * sizeof(float)));
    plan.run(
        begin, end, [&](int64_t first, int64_t last) { k.pack(args, first, last, scratch); },
        [&](int64_t first, int64_t last, int64_t column, int64_t columns) {
          k.multiply(args, first, last, column, columns, scratch, scratch + packed);
        });
  });
}

Tensor packed_linear(const Tensor& x, const Tensor& weight, int64_t columns, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& other, std::optional<int64_t> activation) {
  const char* op = "packed_linear";
  const Rows rows = check_rows(x, op);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, op, ": x must be float32");
  const PackedLinearKernels& k = *kTables[level_index()];
  check_weight(weight, rows.width, columns, k);
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
    args.bias = floats_of(*dense_bias);
  }
  if (other.has_value()) {
    check_shape(*other, rows.count, columns, op, "other");
    STD_TORCH_CHECK(other->scalar_type() == ScalarType::Float, op, ": other must be float32");
    dense_other = as_dense(*other);
    args.other = floats_of(*dense_other);
  }
  const Tensor dense_x = as_dense(x), out = allocate({rows.count, columns}, ScalarType::Float);
  args.x = floats_of(dense_x);
  args.weight = floats_of(weight);
  args.out = static_cast<float*>(out.mutable_data_ptr());
  run(k, args, rows.count);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hbert_kernels, CPU, m) { m.impl("packed_linear", TORCH_BOX(&packed_linear)); }

}  // namespace hbert

// Columns side by side in a weight that this process reads.
extern "C" __attribute__((visibility("default"))) int64_t hbert_packed_weight_panel() {
  return hbert::kTables[hbert::level_index()]->panel;
}
