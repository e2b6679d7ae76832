// The int8 linear layer as the torch side sees it.
#pragma once
#include "level.h"

namespace hbert {

// out[t, n] = (sum_k x[t, k] w[n, k]) x_scale[t] weight_scale[n] + bias[n] + other[t, n]; the sum is exact.
struct Int8Linear {
  int64_t width, columns;  // K, N
  DType out_dtype, other_dtype;
  const int8_t* x;            // [rows, width]
  const float* x_scale;       // [rows]
  const int8_t* weight;       // [panels, steps, panel, group]: w[n, k], n = panel (index) + .., k = group (step) + ..
  const int32_t* start;       // [panels, panel], where the sums start from
  const float* weight_scale;  // [columns]
  const float* bias;          // [columns]
  const void* other;          // [rows, columns], or null
  void* out;                  // [rows, columns]
};

struct Int8LinearKernels {
  int64_t panel, group;  // the layout of the weight at this level: columns side by side, and numbers of each
  int64_t steps;         // a multiple of so many: those behind the width are zero
  bool offset;           // rows are read with 128 added, so that `start` has to be -128 sum_k w[n, k], otherwise 0
  // The positive ones of w[n, 2 k] and w[n, 2 k + 1] add up to 128 at most, and so do the magnitudes of the negative ones:
  // then the sum of their products with numbers from 0 to 255 fits 16 bits.
  bool bounded_pairs;
  int64_t (*max_rows)(int64_t width);  // of a task

  // Bytes of one row as pack leaves it.
  int64_t (*row_bytes)(int64_t width);
  // Rows [begin, end) for multiply: in `space`, or where they are.
  const void* (*pack)(const Int8Linear&, int64_t begin, int64_t end, void* space);
  // Rows [begin, end), which pack has returned, times the columns [column, column + columns), from a whole panel on.
  // sums: scratch, [end - begin rounded up to LinearPlan::kSumRows, panel].
  void (*multiply)(const Int8Linear&, int64_t begin, int64_t end, int64_t column, int64_t columns, const void* rows,
                   int32_t* sums);
};

#define HBERT_DECLARE(level)                  \
  namespace level {                           \
  extern const Int8LinearKernels kInt8Linear; \
  }
HBERT_FOR_LEVELS(HBERT_DECLARE)
#undef HBERT_DECLARE

}  // namespace hbert
