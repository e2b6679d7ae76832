// The product of some rows with a matrix as it lies in memory: allocation, division of the work among threads.
#include "row_product.h"

#include "linear_plan.h"
#include "ops.h"

namespace hbert {
namespace {

#define HBERT_TABLE(level) &level::kRowProduct,
constexpr const RowProductKernels* kTables[] = {HBERT_FOR_CODE_LEVELS(HBERT_TABLE)};
#undef HBERT_TABLE

constexpr int64_t kMaxRows = 96;  // of a task

}  // namespace

Tensor row_product(const Tensor& x, const Tensor& b) {
  const RowProductKernels& k = *kTables[level_index()];
  const Tensor out = allocate({x.size(0), b.size(1)}, ScalarType::Float);
  const RowProduct args{x.size(1), b.size(1), static_cast<const float*>(x.const_data_ptr()),
                        static_cast<const float*>(b.const_data_ptr()), static_cast<float*>(out.mutable_data_ptr())};
  const LinearPlan plan(x.size(0), args.width, args.columns, kMaxRows);
  const int64_t size = k.rows_size(args, plan.block_rows);
  const size_t bytes = (size + k.scratch_size(args, plan.block_rows, LinearPlan::kTaskColumns)) * sizeof(float);
  torch::stable::parallel_for(0, plan.tasks(), plan.grain, [&](int64_t begin, int64_t end) {
    float* rows = reinterpret_cast<float*>(workspace<Slot::kTask>(bytes));
    plan.run(
        begin, end, [&](int64_t first, int64_t last) { k.pack(args, first, last, rows); },
        [&](int64_t first, int64_t last, int64_t column, int64_t columns) {
          k.multiply(args, first, last, column, columns, rows, rows + size);
        });
  });
  return out;
}

}  // namespace hbert
