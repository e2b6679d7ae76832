// The linear layer with a packed weight as the torch side sees it.
#pragma once
#include "row_norm.h"

namespace hbert {

// out[t, n] = act(sum_k x[t, k] w[n, k] + bias[n]) + other[t, n]; x, w, other and out are all of one dtype.
struct PackedLinear {
  int64_t width, columns;  // K, N
  bool activated;
  Activation activation;
  const void* x;       // [rows, width]
  const void* weight;  // [panels, steps, panel, group]: w[n, k], n = panel (index) + .., k = group (step) + ..
  const float* bias;   // [columns], or null
  const void* other;   // [rows, columns], or null
  void* out;           // [rows, columns]
};

// Of one dtype at one level.
struct PackedLinearKernels {
  int64_t panel, group;                // the layout of the weight: columns side by side, and numbers of each
  int64_t steps;                       // a multiple of so many: those behind the width are zero
  int64_t (*max_rows)(int64_t width);  // of a task

  // Bytes of one row as pack leaves it.
  int64_t (*row_bytes)(int64_t width);
  // Rows [begin, end) for multiply: in `space`, or where they are.
  const void* (*pack)(const PackedLinear&, int64_t begin, int64_t end, void* space);
  // Rows [begin, end), which pack has returned, times the columns [column, column + columns), from a whole panel on.
  // sums: scratch, [end - begin rounded up to LinearPlan::kSumRows, panel].
  void (*multiply)(const PackedLinear&, int64_t begin, int64_t end, int64_t column, int64_t columns, const void* rows,
                   float* sums);
};

#define HBERT_DECLARE(level)                                             \
  namespace level {                                                      \
  extern const PackedLinearKernels kPackedLinear, kPackedLinearBFloat16; \
  }
HBERT_FOR_CODE_LEVELS(HBERT_DECLARE)
#undef HBERT_DECLARE

}  // namespace hbert
